"""The linear layer over a packed weight: y = x @ dequantize(W).T + bias.

On a GPU the weight is decoded whole into scratch and multiplied by the library's matmul. On a CPU the decoded
weight is several times larger than the packed one and memory is the bottleneck, so rows are decoded in tiles
that stay in the cache and each tile is multiplied at once: the dense weight never exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..formats import Format, Scratch
from .dequantize import SCRATCH_BYTES, dequantize
from .traced import traced_dequantize

# Weights in one decoded tile, 8 MiB of float32. Half of it makes K-quants up to a third slower, for their many
# small operations and the narrow matmuls; twice of it no longer stays in the cache with its intermediates.
CPU_TILE = 1 << 21
# Tiles begin at multiples of this many rows, hence of 8 bytes: decoding reads 64-bit words.
TILE_ROWS = 8


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    fmt: type[Format],
    shape: Sequence[int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., in] times the packed weight [out, in], plus bias [out]; result [..., out] in x's dtype.

    data: uint8, contiguous, the bytes of a weight of `shape` = (out, in) on x's device; decoded to x's dtype.
    Differentiable with respect to x and bias. Raises SnugError when the bytes do not fit the shape.
    """
    rows, columns = shape
    if torch.compiler.is_compiling():
        return F.linear(x, traced_dequantize(data, fmt.name, list(shape), x.dtype), bias)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    whole = rows * columns <= CPU_TILE or columns % fmt.block_size or data.storage_offset() % 8
    if x.device.type != "cpu" or fmt.dtype is not None or whole or needs_grad:
        return F.linear(x, dequantize(data, fmt, shape, x.dtype), bias)
    fmt.check_nbytes(data.numel(), (rows, columns))
    inputs = x.reshape(-1, x.shape[-1])
    output = x.new_empty(inputs.shape[0], rows)
    _multiply_tiles(inputs, data.view(rows, -1), fmt, columns, bias, output)
    return output.view(*x.shape[:-1], rows)


def _multiply_tiles(
    inputs: torch.Tensor,
    packed_rows: torch.Tensor,
    fmt: type[Format],
    columns: int,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """output [m, out] = inputs [m, in] @ decoded rows.T + bias, a tile of rows at a time.

    All tiles share one scratch: fresh memory costs more page faults than the decoding itself takes.
    """
    rows = packed_rows.shape[0]
    step = max(TILE_ROWS, CPU_TILE // columns // TILE_ROWS * TILE_ROWS)
    scratch = Scratch(inputs.device, step * columns * SCRATCH_BYTES)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = scratch.get("weight", (stop - start, columns), torch.float32)
        blocks = packed_rows[start:stop].view(-1, fmt.block_bytes)
        fmt.decode(blocks, weight.view(-1, fmt.block_size), scratch)
        if inputs.dtype != torch.float32:
            weight = scratch.get("rounded", weight.shape, inputs.dtype).copy_(weight)
        part = output[:, start:stop]
        if bias is None:
            torch.mm(inputs, weight.t(), out=part)
        else:
            torch.addmm(bias[start:stop], inputs, weight.t(), out=part)
