"""The linear layer over a packed weight: y = x @ dequantize(W).T + bias.

On a GPU the weight is decoded whole into scratch and multiplied by the library's matmul. On a CPU the decoded
weight is several times larger than the packed one and memory is the bottleneck, so rows are decoded in tiles
that stay in the cache and each tile is multiplied at once: the dense weight never exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..formats import Format
from .dequantize import dequantize

# Weights in one decoded tile: 4 MiB of float32, small enough for the last-level cache of one CPU and large
# enough for an efficient matmul.
CPU_TILE = 1 << 20


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    fmt: type[Format],
    shape: Sequence[int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., in] times the packed weight [out, in], plus bias [out]; result [..., out] in x's dtype.

    data: uint8, contiguous, the bytes of a weight of `shape` = (out, in) on x's device; decoded to x's dtype.
    Raises SnugError when the bytes do not fit the shape.
    """
    rows, columns = shape
    if x.device.type != "cpu" or rows * columns <= CPU_TILE or columns % fmt.block_size:
        return F.linear(x, dequantize(data, fmt, shape, x.dtype), bias)

    fmt.check_nbytes(data.numel(), (rows, columns))
    packed_rows = data.view(rows, -1)
    step = max(1, CPU_TILE // columns)
    inputs = x.reshape(-1, columns)
    output = x.new_empty(inputs.shape[0], rows)
    tile = x.new_empty(min(step, rows), columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = dequantize(
            packed_rows[start:stop], fmt, (stop - start, columns), x.dtype, tile[: stop - start]
        )
        torch.mm(inputs, weight.t(), out=output[:, start:stop])
    if bias is not None:
        output += bias
    return output.view(*x.shape[:-1], rows)
