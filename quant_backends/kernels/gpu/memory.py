"""Reading packed blocks, whatever their alignment, and putting bytes in order.

Packed bytes are given as a pointer to the widest integers (1, 2 or 4 bytes) that every block begins at a multiple of.
All functions take `block` [n, 1], numbers of blocks of `BYTES` bytes, and return tensors with `n` rows. A word is four
bytes for four neighbouring weights: where a format keeps several weights in a byte, the word is read once for each, so
that the words of a tile are in the order of its weights and each thread writes 16 bytes of neighbours.
"""

# Triton turns the numbers that functions call one another with into the constants that they declare.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(data, block, valid, index, START: tl.constexpr, BYTES: tl.constexpr):
    """int32: the four bytes from START + 4 * index on of each block."""
    BITS: tl.constexpr = data.dtype.element_ty.primitive_bitwidth
    UNIT: tl.constexpr = BITS // 8
    place = data + block * (BYTES // UNIT) + (START // UNIT + index * (4 // UNIT))
    if UNIT == 4:
        word = tl.load(place, mask=valid, other=0)
    elif UNIT == 2:
        low = tl.load(place, mask=valid, other=0).to(tl.int32) & 0xFFFF
        word = low | (tl.load(place + 1, mask=valid, other=0).to(tl.int32) << 16)
    else:
        word = tl.load(place, mask=valid, other=0).to(tl.int32)
        for k in tl.static_range(1, 4):
            word |= tl.load(place + k, mask=valid, other=0).to(tl.int32) << (8 * k)
    return word


@triton.jit
def byte(data, block, valid, index, START: tl.constexpr, BYTES: tl.constexpr):
    """int32 from 0 to 255: byte START + index of each block."""
    BITS: tl.constexpr = data.dtype.element_ty.primitive_bitwidth
    UNIT: tl.constexpr = BITS // 8
    position = START + index
    unit = tl.load(data + block * (BYTES // UNIT) + position // UNIT, mask=valid, other=0)
    return (unit.to(tl.int32) >> (position % UNIT * 8)) & 0xFF


@triton.jit
def half_word(data, block, valid, index, START: tl.constexpr, BYTES: tl.constexpr):
    """int32 from 0 to 65535: the two bytes from START + 2 * index on of each block."""
    BITS: tl.constexpr = data.dtype.element_ty.primitive_bitwidth
    UNIT: tl.constexpr = BITS // 8
    if UNIT == 1:
        low = byte(data, block, valid, 2 * index, START, BYTES)
        found = low | (byte(data, block, valid, 2 * index, START + 1, BYTES) << 8)
    else:
        position = START + 2 * index
        unit = tl.load(data + block * (BYTES // UNIT) + position // UNIT, mask=valid, other=0)
        found = (unit.to(tl.int32) >> (position % UNIT * 8)) & 0xFFFF
    return found


@triton.jit
def as_half(bits):
    """float32: the float16 whose bits are the lower 16 of an int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half(data, block, valid, START: tl.constexpr, BYTES: tl.constexpr):
    """float32 [n, 1]: the float16 number at byte START of each block."""
    return as_half(half_word(data, block, valid, 0, START, BYTES))


@triton.jit
def in_order(a, b, c, d, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """[ROWS, RUNS, length] of what a word's four bytes became, [ROWS, words] each; RUNS: of weights with one scale."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(joined, [ROWS, RUNS, 4 * a.shape[1] // RUNS])


@triton.jit
def unsigned_bytes(word, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """int32 [ROWS, RUNS, length]: the bytes of all words, 0 to 255."""
    return in_order(word & 0xFF, (word >> 8) & 0xFF, (word >> 16) & 0xFF, (word >> 24) & 0xFF, ROWS, RUNS)


@triton.jit
def signed_bytes(word, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """int32 [ROWS, RUNS, length]: the bytes of all words, -128 to 127."""
    return in_order((word << 24) >> 24, (word << 16) >> 24, (word << 8) >> 24, word >> 24, ROWS, RUNS)


@triton.jit
def bits_to_bytes(bits):
    """The lowest four bits of an int32 in the lowest bits of its four bytes."""
    return ((bits & 15) * 0x00204081) & 0x01010101


@triton.jit
def scaled(codes, scale):
    """float32 [n, weights] = scale * codes; codes: int32 [n, runs, length], scale: float32 [n, runs]."""
    values = codes.to(tl.float32) * scale[:, :, None]
    return tl.reshape(values, [codes.shape[0], codes.shape[1] * codes.shape[2]])


@triton.jit
def scaled_above(codes, scale, least):
    """float32 [n, weights] = scale * codes + least; least: float32 [n, runs].

    Where it is used, the product is exact in float32, so it does not matter whether it is rounded before the sum.
    """
    values = codes.to(tl.float32) * scale[:, :, None] + least[:, :, None]
    return tl.reshape(values, [codes.shape[0], codes.shape[1] * codes.shape[2]])


# Triton's interpreter truncates float32 to bfloat16 where GPUs round to the nearest, and cannot multiply bfloat16.
_INTERPRETED = tl.constexpr(not isinstance(words, triton.runtime.JITFunction))


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values in `dtype`, rounded to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        result = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(dtype)
    return result


@triton.jit
def product(a, b, sums):
    """sums + a @ b in float32, of matrices of one type."""
    if _INTERPRETED:  # the interpreter would take the bits of bfloat16 for numbers
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums
