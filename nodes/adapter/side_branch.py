"""The LoRAs of one linear layer as two factors, which a call applies beside the weight or adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.kernels.dispatch import merges_by_kernel
from ...quant_backends.kernels.low_rank import (
    LowRankShape,
    add_low_rank,
    decode_merged,
    merge_low_rank,
    padded_rank,
)
from .lora_kinds import Factors, low_rank_factors
from .lora_settings import AUTOMATIC, MERGE, LoraSettings


class SideBranch:
    """up [out, rank] @ down [rank, in]: the sum of several LoRAs, their ranks behind one another.

    Strengths are multiplied into up in float32, before the one rounding to `dtype`. nbytes: what both take.
    """

    def __init__(
        self,
        factors: Sequence[Factors],
        shape: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        automatic: bool,
    ) -> None:
        self.automatic = automatic
        rank = sum(len(part.down) for part in factors)
        padded = padded_rank(rank, device)
        self.shape = LowRankShape(shape[0], shape[1], padded)
        self.up = torch.zeros((shape[0], padded), dtype=dtype, device=device)
        self.down = torch.zeros((padded, shape[1]), dtype=dtype, device=device)
        start = 0
        for part in factors:
            stop, (rows, columns) = start + len(part.down), (len(part.up), part.down.shape[1])
            up = part.up.to(device, torch.float32) * part.scale
            self.up[part.row : part.row + rows, start:stop] = up
            self.down[start:stop, part.column : part.column + columns] = part.down.to(device)
            start = stop
        self.nbytes = self.up.nbytes + self.down.nbytes

    def applies(self, x: torch.Tensor) -> bool:
        """Whether the layer is to take x [..., in] through the branch rather than merge.

        The choice depends on the number of tokens, which must not become a condition of compiled code.
        """
        if not self.automatic or torch.compiler.is_compiling():
            return True
        tokens = x.numel() // self.shape.columns
        fused = merges_by_kernel(x.device, x.dtype)
        return self.shape.branch_pays(tokens, x.dtype, x.device.type == "cpu", fused)

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with the LoRAs' part added, in place."""
        down, up = (factor.to(x.device, x.dtype, non_blocking=True) for factor in (self.down, self.up))
        return add_low_rank(output, x, down, up)

    def decode_with(self, weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The decoded weight with the LoRAs added, rounded once to `dtype`."""
        return decode_merged(weight, self.down, self.up, dtype)

    def merge_into(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: float32, changed in place."""
        return merge_low_rank(weight, self.down, self.up)


def side_branch(
    layer: torch.nn.Module,
    patches: Sequence[Any],
    device: torch.device | None,
    dtype: torch.dtype,
    settings: LoraSettings,
) -> SideBranch | None:
    """The branch for a layer; None where settings, its kind or the patches want the weight itself.

    device: where its factors are best kept, None for the CPU; dtype: what the layer calculates in.
    """
    if settings.mode == MERGE or not isinstance(layer, torch.nn.Linear):
        return None
    shape = tuple(layer.weight.shape)
    factors = low_rank_factors(patches, shape)
    if not factors:
        return None
    home = torch.device("cpu") if device is None else device
    return SideBranch(factors, shape, home, dtype, settings.mode == AUTOMATIC)
