"""Blocks written by hand from the layouts, with the numbers that they stand for."""

from __future__ import annotations

import struct

import torch
from snug.quant_backends.formats import FORMATS


def _decode(name: str, block: bytes) -> list[float]:
    blocks = torch.frombuffer(bytearray(block), dtype=torch.uint8).view(1, -1)
    return FORMATS[name].dequantize_blocks(blocks)[0].tolist()


def test_q1_0_is_plus_or_minus_its_scale() -> None:
    found = _decode("Q1_0", struct.pack("<e", 0.5) + bytes([0b00000101, 0b10000000]) + bytes(14))
    assert found == [0.5, -0.5, 0.5] + [-0.5] * 12 + [0.5] + [-0.5] * 112


def test_q4_0_low_nibbles_are_the_first_half() -> None:
    found = _decode("Q4_0", struct.pack("<e", 2.0) + bytes([0xF0]) + bytes([0x88] * 15))
    assert found == [-16.0] + [0.0] * 15 + [14.0] + [0.0] * 15


def test_q5_1_takes_the_fifth_bit_and_the_minimum() -> None:
    found = _decode("Q5_1", struct.pack("<ee", 1.0, -3.0) + struct.pack("<I", 1 << 31) + bytes(16))
    assert found == [-3.0] * 31 + [13.0]


def test_q8_0_is_signed() -> None:
    found = _decode("Q8_0", struct.pack("<e", 0.25) + struct.pack("<32b", -128, 127, *range(30)))
    assert found == [-32.0, 31.75] + [0.25 * i for i in range(30)]


def test_q4_k_combines_scale_and_minimum() -> None:
    # Sub-block 0: scale 2, minimum 3. Sub-block 4: scale 16 + 1 and minimum 48 + 2 in split bits.
    scales = bytearray(12)
    scales[0], scales[4], scales[8] = 2 | 1 << 6, 3 | 3 << 6, 1 | 2 << 4
    quants = bytearray(128)
    quants[0], quants[64] = 5, 7
    found = _decode("Q4_K", struct.pack("<ee", 1.0, 0.5) + bytes(scales) + bytes(quants))
    assert found[0:2] == [2 * 5 - 1.5, -1.5]
    assert found[32] == 0.0
    assert found[128:130] == [17 * 7 - 25.0, -25.0]


def test_q6_k_subtracts_32() -> None:
    low, high, scales = bytearray(128), bytearray(64), [0] * 16
    low[0], high[0], scales[0] = 0x01, 0b10, 3
    found = _decode("Q6_K", bytes(low) + bytes(high) + struct.pack("<16b", *scales) + struct.pack("<e", 1.0))
    assert found[0:2] == [3.0 * (33 - 32), 3.0 * -32]


def test_iq4_nl_looks_its_values_up() -> None:
    found = _decode("IQ4_NL", struct.pack("<e", 1.0) + bytes([0xF0]) + bytes([0x88] * 15))
    assert (found[0], found[1], found[16]) == (-127.0, 1.0, 113.0)


def test_mxfp4_scales_by_powers_of_two() -> None:
    found = _decode("MXFP4", bytes([128]) + bytes([0xF7]) + bytes(15))
    assert (found[0], found[1], found[16]) == (12.0, 0.0, -12.0)  # 2^(128-127) * e2m1 6


def test_nvfp4_has_a_scale_for_sixteen_weights() -> None:
    one, two = 7 << 3, 8 << 3  # e4m3 with bias 7
    found = _decode("NVFP4", bytes([one, two, 0, 127]) + bytes([0x21] * 32))
    assert found == [0.5] * 8 + [1.0] * 8 + [1.0] * 8 + [2.0] * 8 + [0.0] * 32


def test_tq2_0_has_three_values() -> None:
    found = _decode("TQ2_0", bytes([0b00100100]) + bytes([0x55] * 63) + struct.pack("<e", 4.0))
    assert (found[0], found[32], found[64], found[96]) == (-4.0, 0.0, 4.0, -4.0)


def test_tq1_0_packs_five_digits_into_a_byte() -> None:
    digits = [2, 0, 1, 2, 1]
    number = sum(digit * 3 ** (4 - i) for i, digit in enumerate(digits))
    found = _decode("TQ1_0", bytes([-(-number * 256 // 243)]) + bytes(51) + struct.pack("<e", 1.0))
    assert [found[32 * i] for i in range(5)] == [digit - 1 for digit in digits]
