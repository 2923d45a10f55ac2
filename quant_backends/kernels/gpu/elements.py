"""Tiles of formats that keep codes and scales in tensors of their own: layouts in `formats.bitsandbytes_4bit`,
`scaled_elements`, `quanto_groups`, `rotated_rows` and `eight_bit_products`.

A tile is `row` [ROWS, 1] by the COLUMNS columns from `first` on, all multiples of 4 but the numbers of rows. It is seen
as runs of RUN neighbours that share their scale. Nothing here may be fused into multiply-adds: launch with
enable_fp_fusion=False.
"""

# Triton turns the numbers that functions call one another with into the constants that they declare.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .memory import in_order, rounded, signed_bytes, unsigned_bytes


@triton.jit
def _float8(code, KIND: tl.constexpr):
    """float32: the float8 number in the lowest 8 bits of an int32; GPUs before Ada have no instruction for it."""
    magnitude = code & 0x7F
    sign = (code & 0x80) << 24
    if KIND == "float8_e5m2":
        value = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # The bits of a float32 with too small an exponent, subnormal or not: a power of two makes up for it.
        if KIND == "float8_e4m3fn":
            bits = magnitude << 20
            correction = 2.0**120
        elif KIND == "float8_e4m3fnuz":
            bits = magnitude << 20
            correction = 2.0**119
        else:
            tl.static_assert(KIND == "float8_e5m2fnuz")
            bits = magnitude << 21
            correction = 2.0**111
        value = (bits | sign).to(tl.float32, bitcast=True) * correction
        not_a_number = magnitude == 0x7F if KIND == "float8_e4m3fn" else (code & 0xFF) == 0x80
        value = tl.where(not_a_number, float("nan"), value)
    return value


@triton.jit
def _numbers(word, KIND: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """float32 [ROWS, RUNS, length]: the numbers that words of four elements hold."""
    if KIND == "int8":
        numbers = signed_bytes(word, ROWS, RUNS).to(tl.float32)
    elif KIND == "uint8":
        numbers = unsigned_bytes(word, ROWS, RUNS).to(tl.float32)
    else:
        a, b = _float8(word, KIND), _float8(word >> 8, KIND)
        numbers = in_order(a, b, _float8(word >> 16, KIND), _float8(word >> 24, KIND), ROWS, RUNS)
    return numbers


@triton.jit
def scaled_elements(
    data, scale, zero, factor, row, valid, first, columns,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, ZERO: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """(number - zero) * scale of its block of DOWN rows and ACROSS columns, 0 for all.

    data: int32, four elements each; EXTRA: "scb" multiplies by 1 / 127, "factor" by a number of each column, "static"
    by that times the one number at `zero`.
    """
    RUNS: tl.constexpr = COLUMNS // RUN
    word = first // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    loaded = tl.load(data + row * (columns // 4) + word, mask=valid & (word < columns // 4), other=0)
    values = _numbers(loaded, KIND, ROWS, RUNS)
    column = first + tl.arange(0, RUNS)[None, :] * RUN
    place = column * 0
    if ACROSS:
        place += column // ACROSS
    if DOWN:
        place += row // DOWN * ((columns + ACROSS - 1) // ACROSS if ACROSS else 1)
    else:
        place += row * 0
    inside = valid & (column < columns)
    if ZERO:
        values -= tl.load(zero + place, mask=inside, other=0).to(tl.float32)[:, :, None]
    values *= tl.load(scale + place, mask=inside, other=0).to(tl.float32)[:, :, None]
    if EXTRA == "scb":
        values *= 7.874015718698502e-3
    values = tl.reshape(values, [ROWS, COLUMNS])
    if EXTRA == "factor" or EXTRA == "static":
        every = first + tl.arange(0, COLUMNS)[None, :]
        by_column = tl.load(factor + every, mask=every < columns, other=0.0)
        if EXTRA == "static":
            by_column *= tl.load(zero)
        values *= by_column
    return values


@triton.jit
def quanto_groups(
    data, scale, shift, row, valid, first, columns, stored_groups,
    BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """scale * code - shift of groups of GROUP columns; a byte holds codes of 8 / BITS groups.

    data: int32 [stored_groups, GROUP / 4].
    """
    RUNS: tl.constexpr = COLUMNS // RUN
    index = first // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    group = row * (columns // GROUP) + index // (GROUP // 4)
    place = group % stored_groups * (GROUP // 4) + index % (GROUP // 4)
    word = tl.load(data + place, mask=valid & (index < columns // 4), other=0)
    codes = unsigned_bytes(word >> (group // stored_groups * BITS), ROWS, RUNS) & ((1 << BITS) - 1)
    run = first + RUN * tl.arange(0, RUNS)[None, :]
    inside = valid & (run < columns)
    group = row * (columns // GROUP) + run // GROUP
    step = tl.load(scale + group, mask=inside, other=0)
    low = tl.load(shift + group, mask=inside, other=0).to(tl.float32)[:, :, None]
    if shift.dtype.element_ty.is_floating():
        values = codes.to(tl.float32) * step.to(tl.float32)[:, :, None]
        if step.dtype != tl.float32:  # quanto multiplies in the type of its scales
            values = rounded(values, step.dtype).to(tl.float32)
        values -= low
    else:
        values = (codes.to(tl.float32) - low) * step.to(tl.float32)[:, :, None]
    return tl.reshape(values, [ROWS, COLUMNS])


@triton.jit
def four_bit(
    data, absmax, quant_map, nested_absmax, nested_map, nested_offset, row, valid, first, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """quant_map[code] * absmax of blocks of BLOCK weights, which may cross rows; NESTED: as in the format, or 0.

    data: int16, four codes each.
    """
    RUNS: tl.constexpr = COLUMNS // RUN
    index = first // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    inside = valid & (index < (columns + 3) // 4)
    pair = tl.load(data + row * (columns // 4) + index, mask=inside, other=0).to(tl.int32)
    a, b = tl.load(quant_map + ((pair >> 4) & 15)), tl.load(quant_map + (pair & 15))
    c, d = tl.load(quant_map + ((pair >> 12) & 15)), tl.load(quant_map + ((pair >> 8) & 15))
    run = first + RUN * tl.arange(0, RUNS)[None, :]
    inside = valid & (run < columns)
    block = (row * columns + run) // BLOCK
    largest = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        scale = tl.load(nested_map + largest.to(tl.int32), mask=inside, other=0.0)
        scale *= tl.load(nested_absmax + block // NESTED, mask=inside, other=0.0)
        scale += tl.load(nested_offset)
    else:
        scale = largest.to(tl.float32)
    values = in_order(a, b, c, d, ROWS, RUNS) * scale[:, :, None]
    return tl.reshape(values, [ROWS, COLUMNS])


@triton.jit
def _rotate_step(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """One step of `formats.rotation.rotate`, in the same order of additions."""
    quads = tl.reshape(values, [ROWS * COLUMNS // (4 * STRIDE), 2, 2, STRIDE])
    even, odd = tl.split(tl.permute(quads, (0, 3, 1, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    ab, ba, cd, dc = a + b, a - b, c + d, c - d
    joined = tl.join(tl.join(ab + dc, cd + ba), tl.join(ab - dc, cd - ba))
    return tl.reshape(tl.permute(joined, (0, 2, 3, 1)), [ROWS, COLUMNS])


@triton.jit
def rotated(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """float32 [ROWS, COLUMNS]: each group of GROUP columns (4, 16, 64, 256 or 1024) rotated."""
    values = _rotate_step(values, ROWS, COLUMNS, 1)
    if GROUP > 4:
        values = _rotate_step(values, ROWS, COLUMNS, 4)
    if GROUP > 16:
        values = _rotate_step(values, ROWS, COLUMNS, 16)
    if GROUP > 64:
        values = _rotate_step(values, ROWS, COLUMNS, 64)
    if GROUP > 256:
        values = _rotate_step(values, ROWS, COLUMNS, 256)
    return values * (1.0 / GROUP**0.5)
