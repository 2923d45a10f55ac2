"""Tiles of ggml's formats with blocks of 32 to 128 weights and one or a few scales: layouts in `formats.legacy`,
`formats.fp4` and `formats.ternary`.

Each function decodes the blocks `block` [ROWS, 1] of `data` to float32 [ROWS, weights per block]; see `memory`.
"""

# Triton turns the numbers that functions call one another with into the constants that they declare.
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    bits_to_bytes,
    byte,
    half,
    in_order,
    scaled,
    scaled_above,
    signed_bytes,
    unsigned_bytes,
    words,
)


@triton.jit
def _nibbles(data, block, valid, START: tl.constexpr, BYTES: tl.constexpr):
    """The words of a block of 32 weights: 16 low nibbles, then 16 high ones."""
    word = tl.arange(0, 8)[None, :]
    return (words(data, block, valid, word % 4, START, BYTES) >> (word // 4 * 4)) & 0x0F0F0F0F


@triton.jit
def _fifth_bits(data, block, valid, START: tl.constexpr, BYTES: tl.constexpr):
    """16 in each byte whose weight has its bit set in the 32 bits at START."""
    word = tl.arange(0, 8)[None, :]
    return bits_to_bytes(words(data, block, valid, 0, START, BYTES) >> (4 * word)) << 4


@triton.jit
def q4_0(data, block, valid, ROWS: tl.constexpr):
    codes = unsigned_bytes(_nibbles(data, block, valid, 2, 18), ROWS, 1) - 8
    return scaled(codes, half(data, block, valid, 0, 18))


@triton.jit
def q4_1(data, block, valid, ROWS: tl.constexpr):
    codes = unsigned_bytes(_nibbles(data, block, valid, 4, 20), ROWS, 1)
    return scaled_above(codes, half(data, block, valid, 0, 20), half(data, block, valid, 2, 20))


@triton.jit
def q5_0(data, block, valid, ROWS: tl.constexpr):
    word = _nibbles(data, block, valid, 6, 22) | _fifth_bits(data, block, valid, 2, 22)
    return scaled(unsigned_bytes(word, ROWS, 1) - 16, half(data, block, valid, 0, 22))


@triton.jit
def q5_1(data, block, valid, ROWS: tl.constexpr):
    word = _nibbles(data, block, valid, 8, 24) | _fifth_bits(data, block, valid, 4, 24)
    codes = unsigned_bytes(word, ROWS, 1)
    return scaled_above(codes, half(data, block, valid, 0, 24), half(data, block, valid, 2, 24))


@triton.jit
def q8_0(data, block, valid, ROWS: tl.constexpr):
    word = words(data, block, valid, tl.arange(0, 8)[None, :], 2, 34)
    return scaled(signed_bytes(word, ROWS, 1), half(data, block, valid, 0, 34))


@triton.jit
def q1_0(data, block, valid, ROWS: tl.constexpr):
    word = tl.arange(0, 32)[None, :]
    bits = words(data, block, valid, word // 8, 2, 18) >> (word % 8 * 4)
    codes = unsigned_bytes(bits_to_bytes(bits), ROWS, 1) * 2 - 1
    return scaled(codes, half(data, block, valid, 0, 18))


@triton.jit
def _looked_up(table, word, scale, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """scale * table[byte] for the bytes of all words; table: float32 [16], scale: float32 [ROWS, RUNS]."""
    # Before they are put in order, so that these loads do not decide which thread has which weights.
    a, b = tl.load(table + (word & 0xFF)), tl.load(table + ((word >> 8) & 0xFF))
    c, d = tl.load(table + ((word >> 16) & 0xFF)), tl.load(table + ((word >> 24) & 0xFF))
    values = in_order(a, b, c, d, ROWS, RUNS) * scale[:, :, None]
    return tl.reshape(values, [ROWS, 4 * word.shape[1]])


@triton.jit
def iq4_nl(data, table, block, valid, ROWS: tl.constexpr):
    word = _nibbles(data, block, valid, 2, 18)
    return _looked_up(table, word, half(data, block, valid, 0, 18), ROWS, 1)


@triton.jit
def iq4_xs(data, table, block, valid, ROWS: tl.constexpr):
    run = tl.arange(0, 8)[None, :]
    low = byte(data, block, valid, run // 2, 4, 136) >> (run % 2 * 4)
    high = words(data, block, valid, 0, 0, 136) >> (16 + 2 * run)
    scale = ((low & 15) | ((high & 3) << 4)) - 32
    word = tl.arange(0, 64)[None, :]
    nibbles = words(data, block, valid, word // 8 * 4 + word % 4, 8, 136) >> (word % 8 // 4 * 4)
    scales = half(data, block, valid, 0, 136) * scale.to(tl.float32)
    return _looked_up(table, nibbles & 0x0F0F0F0F, scales, ROWS, 8)


@triton.jit
def mxfp4(data, table, block, valid, ROWS: tl.constexpr):
    exponent = byte(data, block, valid, 0, 0, 17)
    # Half of the e8m0 number; the two smallest are subnormal.
    bits = tl.where(exponent < 2, 0x200000 << (exponent & 1), (exponent - 1) << 23)
    word = _nibbles(data, block, valid, 1, 17)
    return _looked_up(table, word, bits.to(tl.float32, bitcast=True), ROWS, 1)


@triton.jit
def nvfp4(data, table, block, valid, ROWS: tl.constexpr):
    code = byte(data, block, valid, tl.arange(0, 4)[None, :], 0, 36)
    # Half of the unsigned e4m3 number.
    normal = ((((code >> 3) & 15) + 119) << 23) | ((code & 7) << 20)
    small = (code & 7).to(tl.float32) * 0.0009765625
    scale = tl.where((code & 0x78) == 0, small, normal.to(tl.float32, bitcast=True))
    word = tl.arange(0, 16)[None, :]
    nibbles = words(data, block, valid, word // 4 * 2 + word % 2, 4, 36) >> (word % 4 // 2 * 4)
    return _looked_up(table, nibbles & 0x0F0F0F0F, tl.where(code == 0x7F, 0.0, scale), ROWS, 4)
