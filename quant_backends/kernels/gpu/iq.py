"""Tiles of ggml's IQ formats of 1 to 3 bits, whose blocks have 256 weights: layouts in `formats.iq`.

Each function decodes the blocks `block` [ROWS, 1] of `data` to float32 [ROWS, 256]; see `memory`. table: the format's
grid, int32; an entry of eight weights takes two.
"""

# Triton turns the numbers that functions call one another with into the constants that they declare.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .memory import as_half, bits_to_bytes, byte, half, half_word, scaled, signed_bytes, words


@triton.jit
def _eighth_sign(field):
    """Seven sign bits with an eighth that makes their parity even."""
    parity = field ^ (field >> 4)
    parity ^= parity >> 2
    return field | (((parity ^ (parity >> 1)) & 1) << 7)


@triton.jit
def _for_words(values, ROWS: tl.constexpr):
    """[ROWS, 64]: numbers of runs of eight weights, [ROWS, 32], for each of their two words."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], [ROWS, 32, 2]), [ROWS, 64])


@triton.jit
def _entries(index, ROWS: tl.constexpr):
    """int32 [ROWS, 64]: where the words of vectors of eight weights are in a grid; index: [ROWS, 32]."""
    return 2 * _for_words(index, ROWS) + tl.arange(0, 64)[None, :] % 2


@triton.jit
def _signed(table, entry, signs, scale, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """scale * the grid's words, negative where `signs` [ROWS, 32] (eight for each two words) has a bit."""
    word = tl.arange(0, 64)[None, :]
    negative = bits_to_bytes(_for_words(signs, ROWS) >> (word % 2 * 4))
    # The two's complement of four bytes at once: grids hold no 0, so that adding 1 never carries.
    codes = (tl.load(table + entry) ^ (negative * 255)) + negative
    return scaled(signed_bytes(codes, ROWS, RUNS), scale)


@triton.jit
def _nibble_scales(data, block, valid, COUNT: tl.constexpr, START: tl.constexpr, BYTES: tl.constexpr):
    """float32 [n, COUNT]: the nibbles of the bytes from START on, low before high."""
    run = tl.arange(0, COUNT)[None, :]
    return ((byte(data, block, valid, run // 2, START, BYTES) >> (run % 2 * 4)) & 15).to(tl.float32)


@triton.jit
def iq2_xxs(data, table, block, valid, ROWS: tl.constexpr):
    run = tl.arange(0, 8)[None, :]
    top = (words(data, block, valid, 2 * run + 1, 2, 66) >> 28) & 15
    scale = half(data, block, valid, 0, 66) * (top.to(tl.float32) + 0.5) * 0.25
    vector = tl.arange(0, 32)[None, :]
    field = (words(data, block, valid, vector // 4 * 2 + 1, 2, 66) >> (vector % 4 * 7)) & 127
    index = byte(data, block, valid, vector // 4 * 8 + vector % 4, 2, 66)
    return _signed(table, _entries(index, ROWS), _eighth_sign(field), scale, ROWS, 8)


@triton.jit
def iq2_xs(data, table, block, valid, ROWS: tl.constexpr):
    scale = half(data, block, valid, 0, 74) * (_nibble_scales(data, block, valid, 16, 66, 74) + 0.5) * 0.25
    packed = half_word(data, block, valid, tl.arange(0, 32)[None, :], 2, 74)
    return _signed(table, _entries(packed & 511, ROWS), _eighth_sign(packed >> 9), scale, ROWS, 16)


@triton.jit
def iq2_s(data, table, block, valid, ROWS: tl.constexpr):
    scale = half(data, block, valid, 0, 82) * (_nibble_scales(data, block, valid, 16, 74, 82) + 0.5) * 0.25
    vector = tl.arange(0, 32)[None, :]
    high = (byte(data, block, valid, vector // 4, 66, 82) >> (vector % 4 * 2)) & 3
    index = byte(data, block, valid, vector, 2, 82) | (high << 8)
    return _signed(table, _entries(index, ROWS), byte(data, block, valid, vector, 34, 82), scale, ROWS, 16)


@triton.jit
def iq3_xxs(data, table, block, valid, ROWS: tl.constexpr):
    run = tl.arange(0, 8)[None, :]
    top = (words(data, block, valid, run, 66, 98) >> 28) & 15
    scale = half(data, block, valid, 0, 98) * (top.to(tl.float32) + 0.5) * 0.5
    vector = tl.arange(0, 32)[None, :]
    field = (words(data, block, valid, vector // 4, 66, 98) >> (vector % 4 * 7)) & 127
    index = byte(data, block, valid, tl.arange(0, 64)[None, :], 2, 98)
    return _signed(table, index, _eighth_sign(field), scale, ROWS, 8)


@triton.jit
def iq3_s(data, table, block, valid, ROWS: tl.constexpr):
    scale = half(data, block, valid, 0, 110) * (_nibble_scales(data, block, valid, 8, 106, 110) * 2 + 1)
    word = tl.arange(0, 64)[None, :]
    ninth = (byte(data, block, valid, word // 8, 66, 110) >> (word % 8)) & 1
    index = byte(data, block, valid, word, 2, 110) | (ninth << 8)
    signs = byte(data, block, valid, tl.arange(0, 32)[None, :], 74, 110)
    return _signed(table, index, signs, scale, ROWS, 8)


@triton.jit
def iq1_s(data, table, block, valid, ROWS: tl.constexpr):
    top = (half_word(data, block, valid, tl.arange(0, 8)[None, :], 34, 50) >> 12) & 7
    scale = half(data, block, valid, 0, 50) * 0.125 * (2 * top + 1).to(tl.float32)
    vector = tl.arange(0, 32)[None, :]
    packed = half_word(data, block, valid, vector // 4, 34, 50)
    high = ((packed >> (vector % 4 * 3)) & 7) | (packed >> 15 << 3)
    index = byte(data, block, valid, vector, 2, 50) | (high << 8)
    return scaled(signed_bytes(tl.load(table + _entries(index, ROWS)), ROWS, 8), scale)


@triton.jit
def iq1_m(data, table, block, valid, ROWS: tl.constexpr):
    bits = half_word(data, block, valid, 0, 48, 56) >> 12
    for k in tl.static_range(1, 4):
        bits |= half_word(data, block, valid, k, 48, 56) >> 12 << (4 * k)
    run = tl.arange(0, 16)[None, :]
    code = (half_word(data, block, valid, run // 4, 48, 56) >> (run % 4 * 3)) & 7
    scale = as_half(bits) * 0.125 * (2 * code + 1).to(tl.float32)
    vector = tl.arange(0, 32)[None, :]
    high = (byte(data, block, valid, vector // 2, 32, 56) >> (vector % 2 * 4)) & 15
    index = byte(data, block, valid, vector, 0, 56) | (high << 8)
    return scaled(signed_bytes(tl.load(table + _entries(index, ROWS)), ROWS, 16), scale)
