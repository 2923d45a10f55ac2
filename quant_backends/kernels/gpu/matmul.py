"""x @ W.T for few rows of x: the weight is decoded in registers and never written.

Reading the packed weight is what takes time then. Sums are in float32. Where the weight has too few rows to occupy the
GPU, its columns are divided among `splits` programs, whose sums `combine` adds in a fixed order.
"""

# Triton turns the numbers that functions call one another with into the constants that they declare.
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .memory import product, rounded
from .tiles import weight_tile


@triton.jit
def vectors_product(
    x, data, part0, part1, part2, part3, part4, bias, out, tokens, rows, columns, extent, per_split,
    FAMILY: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out [splits, tokens, rows] = x [tokens, columns] @ W [rows, columns].T + bias, for up to TOKENS rows of x.

    Products are summed in place of the tile; only the end sums across threads. per_split: columns of each split.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row[:, None] < rows
    token = tl.arange(0, TOKENS)[:, None]
    sums = tl.zeros([TOKENS, ROWS, COLUMNS], tl.float32)
    begin = tl.program_id(1) * per_split
    for first in range(begin, tl.minimum(begin + per_split, columns), COLUMNS):
        weight = weight_tile(
            data, part0, part1, part2, part3, part4, row[:, None], valid, first, columns, extent,
            FAMILY, KIND, A, B, C, D, RUN, ROWS, COLUMNS,
        )  # fmt: skip
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (token < tokens) & (column < columns)
        values = tl.load(x + token * columns + column, mask=inside, other=0.0).to(tl.float32)
        sums = tl.fma(values[:, None, :], weight[None, :, :], sums)
    total = tl.sum(sums, axis=2)
    inside = (token < tokens) & (row[None, :] < rows)
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    place = out + (tl.program_id(1) * tokens + token) * rows + row[None, :]
    tl.store(place, rounded(total, out.dtype.element_ty), mask=inside)


@triton.jit
def matrix_product(
    x, data, part0, part1, part2, part3, part4, bias, out, tokens, rows, columns, extent, per_split,
    FAMILY: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The same for more rows of x, TOKENS (16 or more) for each program, on the GPU's matrix units.

    The weight is rounded to x's type, as it is where it is decoded first.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row[:, None] < rows
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)[:, None]
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    begin = tl.program_id(1) * per_split
    for first in range(begin, tl.minimum(begin + per_split, columns), COLUMNS):
        weight = weight_tile(
            data, part0, part1, part2, part3, part4, row[:, None], valid, first, columns, extent,
            FAMILY, KIND, A, B, C, D, RUN, ROWS, COLUMNS,
        )  # fmt: skip
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (token < tokens) & (column < columns)
        values = tl.load(x + token * columns + column, mask=inside, other=0.0)
        narrow = rounded(weight, x.dtype.element_ty)
        sums = product(values, tl.trans(narrow), sums)
    inside = (token < tokens) & (row[None, :] < rows)
    if BIAS:
        sums += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    place = out + (tl.program_id(1) * tokens + token) * rows + row[None, :]
    tl.store(place, rounded(sums, out.dtype.element_ty), mask=inside)


@triton.jit
def combine(partial, bias, out, count, rows, splits, SIZE: tl.constexpr, BIAS: tl.constexpr):
    """out [count] = the sum over splits of partial [splits, count], plus bias [rows] repeated."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    total = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * count + place, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + place % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, rounded(total, out.dtype.element_ty), mask=inside)
