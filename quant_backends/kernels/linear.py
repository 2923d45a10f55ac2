"""The linear layer over a packed weight: y = x @ dequantize(W).T + bias.

On a GPU the weight is decoded whole into scratch and multiplied by the library's matmul, or for few rows of x by a
kernel that decodes as it goes. On a CPU the decoded weight is several times larger than the packed one and memory is
the bottleneck, so rows are decoded in tiles that stay in the cache and each tile is multiplied at once: the dense
weight never exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..core.packed import PackedTensor
from ..formats import Format, Scratch
from ..formats.scaled_base import ScaledFormat
from .dequantize import SCRATCH_BYTES, dequantize_packed
from .dispatch import linear_by_kernel
from .eight_bit import eight_bit_linear, rounds_input
from .native import native_decoder

# Weights in one decoded tile, 8 MiB of float32. Half of it makes K-quants up to a third slower, for their many
# small operations and the narrow matmuls; twice of it no longer stays in the cache with its intermediates.
CPU_TILE = 1 << 21
# Tiles begin at multiples of this many rows, hence of 8 bytes: decoding reads 64-bit words.
TILE_ROWS = 8

# (first row, row behind the last, float32 tile to decode them into, scratch memory)
DecodeRows = Callable[[int, int, torch.Tensor, Scratch], None]


def linear(x: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times the packed weight [out, in], plus bias [out]; result [..., out] in x's dtype.

    weight: on x's device; decoded to x's dtype. Differentiable with respect to x and bias.
    """
    # 8-bit products round x as well, unless there is a gradient to be had or they would not pay.
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if not needs_grad and rounds_input(weight, x):
        return eight_bit_linear(x, weight, bias)
    result = None if needs_grad else linear_by_kernel(x, weight, bias)
    if result is not None:
        return result
    decode = None if x.device.type != "cpu" or needs_grad else _row_decoder(weight)
    if decode is None:
        return F.linear(x, dequantize_packed(weight, x.dtype), bias)
    rows, columns = weight.shape
    inputs = x.reshape(-1, x.shape[-1])
    output = x.new_empty(inputs.shape[0], rows)
    _multiply_tiles(inputs, decode, columns, bias, output)
    return output.view(*x.shape[:-1], rows)


def _row_decoder(weight: PackedTensor) -> DecodeRows | None:
    """What decodes some rows of a large weight; None when the weight is better, or only, decoded whole."""
    fmt, (rows, columns) = weight.format, weight.shape
    if rows * columns <= CPU_TILE:
        return None
    if isinstance(fmt, ScaledFormat):

        def decode_scaled(start: int, stop: int, tile: torch.Tensor, scratch: Scratch) -> None:
            fmt.decode_rows(weight.data, weight.parts, weight.shape, start, stop, tile, scratch)

        return decode_scaled
    ggml: type[Format] = fmt
    native = native_decoder(ggml, weight.data)
    if ggml.dtype is not None or columns % ggml.block_size:
        return None
    if native is None and weight.data.storage_offset() % 8:
        return None
    packed_rows = weight.data.view(rows, -1)

    def decode_blocks(start: int, stop: int, tile: torch.Tensor, scratch: Scratch) -> None:
        blocks = packed_rows[start:stop].view(-1, ggml.block_bytes)
        if native is not None:
            native(blocks, tile.view(-1, ggml.block_size))
        else:
            ggml.decode(blocks, tile.view(-1, ggml.block_size), scratch)

    return decode_blocks


def _multiply_tiles(
    inputs: torch.Tensor,
    decode: DecodeRows,
    columns: int,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """output [m, out] = inputs [m, in] @ decoded rows.T + bias, a tile of rows at a time.

    All tiles share one scratch: fresh memory costs more page faults than the decoding itself takes.
    """
    rows = output.shape[1]
    step = max(TILE_ROWS, CPU_TILE // columns // TILE_ROWS * TILE_ROWS)
    scratch = Scratch(inputs.device, step * columns * SCRATCH_BYTES)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = scratch.get("weight", (stop - start, columns), torch.float32)
        decode(start, stop, weight, scratch)
        if inputs.dtype != torch.float32:
            weight = scratch.get("rounded", weight.shape, inputs.dtype).copy_(weight)
        part = output[:, start:stop]
        if bias is None:
            torch.mm(inputs, weight.t(), out=part)
        else:
            torch.addmm(bias[start:stop], inputs, weight.t(), out=part)
