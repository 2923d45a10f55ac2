"""Tiles of a weight matrix in any format, decoding all of them, and adding low-rank changes on the way."""

# Triton turns the numbers that functions call one another with into the constants that they declare.
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import decode
from .elements import four_bit, quanto_groups, rotated, scaled_elements
from .memory import product, rounded


@triton.jit
def weight_tile(
    data, part0, part1, part2, part3, part4, row, valid, first, columns, extent,
    FAMILY: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, COLUMNS]: the weights of the rows `row` [ROWS, 1], where `valid`, and the columns from `first` on.

    What the arguments mean depends on FAMILY; `operands` makes them. Weights outside the matrix are 0.
    """
    if FAMILY == "blocks":
        SIZE: tl.constexpr = A
        BLOCKS: tl.constexpr = COLUMNS // SIZE
        column = first // SIZE + tl.arange(0, BLOCKS)[None, :]
        block = tl.reshape(row * (columns // SIZE) + column, [ROWS * BLOCKS, 1])
        inside = tl.reshape(valid & (column < columns // SIZE), [ROWS * BLOCKS, 1])
        values = tl.reshape(decode(data, part0, block, inside, KIND, ROWS * BLOCKS), [ROWS, COLUMNS])
    elif FAMILY == "groups":
        values = quanto_groups(
            data, part0, part1, row, valid, first, columns, extent, A, ROWS, COLUMNS, RUN, B
        )
    elif FAMILY == "four_bit":
        values = four_bit(
            data, part0, part1, part2, part3, part4, row, valid, first, columns, ROWS, COLUMNS, RUN, A, B
        )
    else:
        tl.static_assert(FAMILY == "elements")
        values = scaled_elements(
            data,
            part0,
            part1,
            part2,
            row,
            valid,
            first,
            columns,
            KIND,
            ROWS,
            COLUMNS,
            RUN,
            A,
            B,
            C == "zero",
            C,
        )
        if D:
            values = rotated(values, ROWS, COLUMNS, D)
    return values


@triton.jit
def dequantize_tiles(
    data, part0, part1, part2, part3, part4, out, up, down, rows, columns, extent, rank,
    FAMILY: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOW_RANK: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = the decoded weight, plus up [rows, rank] @ down [rank, columns] where LOW_RANK.

    rank: a multiple of 16. The sum is rounded once.
    """
    # One dimension of programs: the others of a grid end at 65535.
    across = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]
    first = tl.program_id(0) % across * COLUMNS
    valid = row < rows
    values = weight_tile(
        data, part0, part1, part2, part3, part4, row, valid, first, columns, extent,
        FAMILY, KIND, A, B, C, D, RUN, ROWS, COLUMNS,
    )  # fmt: skip
    column = first + tl.arange(0, COLUMNS)[None, :]
    if LOW_RANK:
        change = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, rank, 16):
            step = start + tl.arange(0, 16)
            left = tl.load(up + row * rank + step[None, :], mask=valid, other=0.0)
            right = tl.load(down + step[:, None] * columns + column, mask=column < columns, other=0.0)
            change = product(left, right, change)
        values += change
    place = out + row * columns + column
    tl.store(place, rounded(values, out.dtype.element_ty), mask=valid & (column < columns))
