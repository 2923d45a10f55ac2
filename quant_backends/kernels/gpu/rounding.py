"""Rows of a weight in any format, or of plain numbers, rounded to 8 bits with a scale for each: in one pass.

A program has whole rows in its registers, as two tiles of powers of two: they are decoded once, and neither the
decoded nor the rotated row is ever written. The results are those of torch in float32 to the bit.
"""

# Triton turns the numbers that functions call one another with into the constants that they declare.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .elements import rotated
from .tiles import weight_tile

_TINY, _HUGE = tl.constexpr(2.0**-126), tl.constexpr(float.fromhex("0x1.fffffep127"))


@triton.jit
def _tile(
    data, part0, part1, part2, part3, part4, row, valid, first, columns, extent,
    FAMILY: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """As `weight_tile`, in groups of WIDTH columns rotated; FAMILY "plain": data is float and not packed."""
    if FAMILY == "plain":
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = valid & (column < columns)
        values = tl.load(data + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    else:
        values = weight_tile(
            data, part0, part1, part2, part3, part4, row, valid, first, columns, extent,
            FAMILY, KIND, A, B, C, D, RUN, ROWS, COLUMNS,
        )  # fmt: skip
    if WIDTH > 1:
        values = rotated(values, ROWS, COLUMNS, WIDTH)
    return values


@triton.jit
def _magnitudes(values):
    """The bits of the largest magnitude of each row: as integers, NaN is above all."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _float8_e4m3fn(values, sign):
    """int32: the nearest float8 number, ties to even, of float32 up to 464 or NaN; GPUs before Ada cannot do it.

    sign: numbers of the same signs.
    """
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Next to 2 ** 14 numbers are as far apart as float8's subnormal ones.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < (121 << 23), small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return code | ((sign.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def _store_codes(
    codes, values, scale, inverse, row, valid, first, columns,
    STORED: tl.constexpr, BOUNDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """codes [rows, columns], one byte each = values / scale, rounded."""
    if BOUNDED:
        values = tl.minimum(tl.maximum(values, -_HUGE), _HUGE)
    # The correctly rounded quotient, from the correctly rounded 1 / scale (Markstein, 1990).
    quotient = values * inverse
    quotient = tl.fma(tl.fma(-quotient, scale, values), inverse, quotient)
    if STORED == "int8":
        # Above 2 ** 23 numbers are whole, and the lowest byte is that of the integer.
        rounded = (quotient + 12582912.0).to(tl.int32, bitcast=True)
    else:
        tl.static_assert(STORED == "float8_e4m3fn")
        rounded = _float8_e4m3fn(quotient, values)  # a quotient of -0 has become 0
    column = first + tl.arange(0, COLUMNS)[None, :]
    tl.store(codes + row * columns + column, rounded.to(tl.int8), mask=valid & (column < columns))


@triton.jit
def round_rows(
    data, part0, part1, part2, part3, part4, codes, scales, rows, columns, extent,
    FAMILY: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
    STORED: tl.constexpr, LARGEST: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """codes [rows, columns] = rows / scales, rounded to nearest; scales, float32 [rows] = largest magnitude / LARGEST.

    COLUMNS + REST, of which REST may be 0, are at least `columns`. WIDTH: columns that are rotated together, 1 for
    none. BOUNDED: infinities become the largest code, otherwise they make their row's scale infinite. NaN makes it NaN.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    valid = row < rows
    values = _tile(
        data, part0, part1, part2, part3, part4, row, valid, 0, columns, extent,
        FAMILY, KIND, A, B, C, D, RUN, ROWS, COLUMNS, WIDTH,
    )  # fmt: skip
    largest = _magnitudes(values)
    if REST:
        others = _tile(
            data, part0, part1, part2, part3, part4, row, valid, COLUMNS, columns, extent,
            FAMILY, KIND, A, B, C, D, RUN, ROWS, REST, WIDTH,
        )  # fmt: skip
        largest = tl.maximum(largest, _magnitudes(others))
    magnitude = tl.expand_dims(largest.to(tl.float32, bitcast=True), 1)
    scale = tl.div_rn(magnitude, tl.full([ROWS, 1], LARGEST, tl.float32))
    # Comparisons with NaN are false, so that it stays.
    scale = tl.where(scale < _TINY, _TINY, scale)
    if BOUNDED:
        scale = tl.where(scale > _HUGE / LARGEST, _HUGE / LARGEST, scale)
    tl.store(scales + row, scale, mask=valid)
    inverse = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), scale)
    _store_codes(codes, values, scale, inverse, row, valid, 0, columns, STORED, BOUNDED, COLUMNS)
    if REST:
        _store_codes(codes, others, scale, inverse, row, valid, COLUMNS, columns, STORED, BOUNDED, REST)
