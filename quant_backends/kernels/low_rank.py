"""A low-rank change of a linear layer, y = x @ (W + up @ down).T + bias: beside the weight, or added to it.

Beside it costs two small matmuls for each token, and W may stay packed. Added to it costs one for the whole weight,
once for each call, and W has to exist in float32 meanwhile. Which is cheaper depends on the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core.packed import PackedTensor
from .dequantize import dequantize_packed
from .dispatch import decode_changed_by_kernel

# How many operations take as long as moving one byte. CPU: measured by benchmarks/lora_modes.py. GPU: from data sheets
# (16-bit matmul on tensor cores over memory bandwidth: about 160 on current desktop cards, 200 on data-center ones).
CPU_FLOP_PER_BYTE = 10
# A CPU without matrix units for them multiplies 16-bit numbers this many times slower than float32 (same measurement).
CPU_HALF_COST = 3
GPU_FLOP_PER_BYTE = 160
# A GPU multiplies 16-bit numbers this many times faster than float32 (2 to 16 on cards since 2020).
GPU_HALF_SPEED = 4
# Matrix units wait for the decoding around them; an estimate.
FUSED_COST = 2
# Ranks are padded to whole tiles of a GPU's matrix units.
RANK_STEP = 16


@dataclass(frozen=True, slots=True)
class LowRankShape:
    """up [rows, rank] @ down [rank, columns]."""

    rows: int
    columns: int
    rank: int

    @property
    def merge_flop(self) -> int:
        """Operations of adding the product to the weight, once for each call."""
        return 2 * self.rank * self.rows * self.columns

    def branch_flop(self, tokens: int) -> int:
        """Operations of taking `tokens` rows of activations through the factors."""
        return 2 * tokens * self.rank * (self.rows + self.columns)

    def branch_pays(self, tokens: int, dtype: torch.dtype, on_cpu: bool, fused: bool = False) -> bool:
        """Whether the branch is the faster way for this many rows of activations of `dtype`; an estimate.

        fused: the weight is changed by the kernel that decodes it, which moves no more bytes than without a change.
        """
        size = dtype.itemsize
        # Written by the decoder in place of the narrow weight, changed, read, and written once more when it is rounded.
        merge_bytes = self.rows * self.columns * (16 if dtype == torch.float32 else 16 + size)
        branch_bytes = tokens * size * (self.columns + 2 * self.rows)
        if on_cpu:
            cost = 1 if dtype == torch.float32 else CPU_HALF_COST
            merge = self.merge_flop + CPU_FLOP_PER_BYTE * merge_bytes
            return cost * self.branch_flop(tokens) + CPU_FLOP_PER_BYTE * branch_bytes < merge
        if fused:
            branch = self.branch_flop(tokens) + GPU_FLOP_PER_BYTE * branch_bytes
            return branch < FUSED_COST * self.merge_flop
        slower = 1 if dtype == torch.float32 else GPU_HALF_SPEED
        merge = slower * self.merge_flop + GPU_FLOP_PER_BYTE * merge_bytes
        return self.branch_flop(tokens) + GPU_FLOP_PER_BYTE * branch_bytes < merge


def add_low_rank(output: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """output [..., out] += x [..., in] @ down.T @ up.T in place; down [rank, in], up [out, rank].

    All of one floating dtype and device; output contiguous. Returns output.
    """
    hidden = F.linear(x.reshape(-1, x.shape[-1]), down)
    output.view(-1, output.shape[-1]).addmm_(hidden, up.t())
    return output


def merge_low_rank(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """weight [out, in], float32 and contiguous, += up @ down in place, calculated in float32. Returns weight."""
    return weight.addmm_(up.to(weight.device, torch.float32), down.to(weight.device, torch.float32))


def decode_merged(
    packed: PackedTensor, down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The packed weight [out, in] decoded, plus up [out, rank] @ down [rank, in], rounded once to `dtype`."""
    device = packed.data.device
    down, up = (factor.to(device, non_blocking=True) for factor in (down, up))
    merged = decode_changed_by_kernel(packed, down, up, dtype)
    return merge_low_rank(dequantize_packed(packed), down, up).to(dtype) if merged is None else merged


def padded_rank(rank: int, device: torch.device) -> int:
    """The rank that factors are stored with on `device`: zeros behind them change nothing."""
    return rank if device.type == "cpu" else -(-rank // RANK_STEP) * RANK_STEP
