"""Rotating groups of input channels, so that no single one of them needs a large scale.

Each group of `size` channels (a power of 4) is multiplied by the regular Hadamard matrix: the Kronecker power of

    1  1  1 -1
    1  1 -1  1
    1 -1  1  1
   -1  1  1  1

divided by sqrt(size), as in comfy-kitchen's ConvRot (tensor/int8_utils.py). It is symmetric and its own inverse. Done
in steps of additions, whose order is the same for any number of rows and on any device.
"""

from __future__ import annotations

import math

import torch


def rotate(values: torch.Tensor, size: int, spare: torch.Tensor) -> torch.Tensor:
    """values (float32, contiguous, columns a multiple of `size`) times the matrix, group by group, in place.

    spare: memory of the same shape and dtype, which is overwritten. Returns `values`.
    """
    stride = 1
    while stride < size:
        a, b, c, d = values.view(-1, 4, stride).unbind(1)
        to_a, to_b, to_c, to_d = spare.view(-1, 4, stride).unbind(1)
        # Sums and differences of pairs take the places of results until those are made from them.
        torch.add(a, b, out=to_a)
        torch.sub(a, b, out=to_b)
        torch.add(c, d, out=to_c)
        torch.sub(c, d, out=to_d)
        torch.add(to_a, to_d, out=a)
        torch.sub(to_a, to_d, out=b)
        torch.add(to_c, to_b, out=c)
        torch.sub(to_c, to_b, out=d)
        stride *= 4
    return values.mul_(1 / math.isqrt(size))
