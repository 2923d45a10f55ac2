"""Tiles of ggml's K-quants and ternary formats, whose blocks have 256 weights: layouts in `formats.k_quants` and
`formats.ternary`.

Each function decodes the blocks `block` [ROWS, 1] of `data` to float32 [ROWS, 256]; see `memory`. Scales are decoded
once for each run of weights and handed to the threads that need them.
"""

# Triton turns the numbers that functions call one another with into the constants that they declare.
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .memory import byte, half, scaled, scaled_above, unsigned_bytes, words


@triton.jit
def _bit_pairs(data, block, valid, START: tl.constexpr, BYTES: tl.constexpr):
    """The words of 256 weights: weight 128h + 32k + j is in bits 2k, 2k+1 of byte START + 32h + j."""
    word = tl.arange(0, 64)[None, :]
    found = words(data, block, valid, word // 32 * 8 + word % 8, START, BYTES)
    return (found >> (word % 32 // 8 * 2)) & 0x03030303


@triton.jit
def _nibbles(data, block, valid, START: tl.constexpr, BYTES: tl.constexpr):
    """The words of 256 weights: weight 64k + 32h + j is in nibble h of byte START + 32k + j."""
    word = tl.arange(0, 64)[None, :]
    found = words(data, block, valid, word // 16 * 8 + word % 8, START, BYTES)
    return (found >> (word % 16 // 8 * 4)) & 0x0F0F0F0F


@triton.jit
def _negative(values):
    """-values, and -0 of 0: Triton before 3.9 subtracts from 0, which gives 0."""
    return values * -1.0


@triton.jit
def _scales_and_minima(data, block, valid, BYTES: tl.constexpr):
    """(scales, minima below zero) of the eight runs of Q4_K and Q5_K: two float32 [n, 8]."""
    run = tl.arange(0, 8)[None, :]
    first = byte(data, block, valid, run % 4, 4, BYTES)
    second = byte(data, block, valid, run % 4, 8, BYTES)
    last = byte(data, block, valid, run % 4, 12, BYTES)
    scale = tl.where(run < 4, first & 63, (last & 15) | (first >> 6 << 4))
    least = tl.where(run < 4, second & 63, (last >> 4) | (second >> 6 << 4))
    d, dmin = half(data, block, valid, 0, BYTES), half(data, block, valid, 2, BYTES)
    return d * scale.to(tl.float32), _negative(dmin * least.to(tl.float32))


@triton.jit
def q2_k(data, block, valid, ROWS: tl.constexpr):
    packed = byte(data, block, valid, tl.arange(0, 16)[None, :], 0, 84)
    scale = half(data, block, valid, 80, 84) * (packed & 15).to(tl.float32)
    least = _negative(half(data, block, valid, 82, 84) * (packed >> 4).to(tl.float32))
    return scaled_above(unsigned_bytes(_bit_pairs(data, block, valid, 16, 84), ROWS, 16), scale, least)


@triton.jit
def q3_k(data, block, valid, ROWS: tl.constexpr):
    run = tl.arange(0, 16)[None, :]
    low = (byte(data, block, valid, run % 8, 96, 110) >> (run // 8 * 4)) & 15
    high = (byte(data, block, valid, run % 4, 104, 110) >> (run // 4 * 2)) & 3
    scale = half(data, block, valid, 108, 110) * ((low | (high << 4)) - 32).to(tl.float32)
    word = tl.arange(0, 64)[None, :]
    third = (words(data, block, valid, word % 8, 0, 110) >> (word // 8)) & 0x01010101
    codes = unsigned_bytes(_bit_pairs(data, block, valid, 32, 110) | (third << 2), ROWS, 16) - 4
    return scaled(codes, scale)


@triton.jit
def q4_k(data, block, valid, ROWS: tl.constexpr):
    scale, least = _scales_and_minima(data, block, valid, 144)
    return scaled_above(unsigned_bytes(_nibbles(data, block, valid, 16, 144), ROWS, 8), scale, least)


@triton.jit
def q5_k(data, block, valid, ROWS: tl.constexpr):
    scale, least = _scales_and_minima(data, block, valid, 176)
    word = tl.arange(0, 64)[None, :]
    fifth = (words(data, block, valid, word % 8, 16, 176) >> (word // 8)) & 0x01010101
    codes = unsigned_bytes(_nibbles(data, block, valid, 48, 176) | (fifth << 4), ROWS, 8)
    return scaled_above(codes, scale, least)


@triton.jit
def q6_k(data, block, valid, ROWS: tl.constexpr):
    run = tl.arange(0, 16)[None, :]
    code = (byte(data, block, valid, run, 192, 210) << 24) >> 24
    scale = half(data, block, valid, 208, 210) * code.to(tl.float32)
    word = tl.arange(0, 64)[None, :]
    low = words(data, block, valid, word // 32 * 16 + word % 16, 0, 210) >> (word % 32 // 16 * 4)
    codes = (low & 0x0F0F0F0F) | (_bit_pairs(data, block, valid, 128, 210) << 4)
    return scaled(unsigned_bytes(codes, ROWS, 16) - 32, scale)


@triton.jit
def tq2_0(data, block, valid, ROWS: tl.constexpr):
    codes = unsigned_bytes(_bit_pairs(data, block, valid, 0, 66), ROWS, 1) - 1
    return scaled(codes, half(data, block, valid, 64, 66))


@triton.jit
def tq1_0(data, block, valid, ROWS: tl.constexpr):
    word = tl.arange(0, 64)[None, :]
    # Five digits of 8 words, five of 4 words, four of one word.
    digit = tl.where(word < 40, word // 8, tl.where(word < 60, (word - 40) // 4, word - 60))
    place = tl.where(word < 40, word % 8, tl.where(word < 60, 8 + word % 4, 12))
    power = tl.where(
        digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81)))
    )
    packed = words(data, block, valid, place, 0, 54)
    # Two bytes at a time, each with 16 bits to be multiplied in.
    even = (((packed & 0x00FF00FF) * power & 0x00FF00FF) * 3 >> 8) & 0x00FF00FF
    odd = (((packed >> 8 & 0x00FF00FF) * power & 0x00FF00FF) * 3) & 0x7F00FF00
    codes = unsigned_bytes(even | odd, ROWS, 1) - 1
    return scaled(codes, half(data, block, valid, 52, 54))
