"""ggml's K-quants: super-blocks of 256 weights whose sub-blocks have small integer scales.

Layouts: `block_q2_K` … `block_q6_K` in ggml-common.h; the order of operations follows the gguf package, to
which results are equal bit for bit. Signed codes are unpacked into the top bits of a byte, where flipping the
highest bit subtracts the offset; the scale is divided by the power of two that this multiplies in, exactly.
"""

from __future__ import annotations

import torch

from .base import Format, Scratch
from .k_encoding import encode_q2_k, encode_q3_k, encode_q4_k, encode_q5_k, encode_q6_k
from .words import column_words, extract, half_floats, number, scale_codes, splat


def _scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of the eight sub-blocks of Q4_K and Q5_K: two float32 [n, 8].

    A block begins with d f16, dmin f16 and 12 bytes of 6-bit numbers: bytes 0-3 hold scales 0-3 and bytes 4-7
    minima 0-3 in their low 6 bits, with the top 2 bits of scales and minima 4-7 above; bytes 8-11 hold the
    low nibbles of scales (low) and minima (high) 4-7.
    """
    n = blocks.shape[0]
    planes = torch.empty((4, n), dtype=torch.int32, device=blocks.device)
    planes.copy_(
        blocks[:, :16].view(torch.int32).t()
    )  # one long dimension is several times faster than n rows
    first, last = planes[1:3], planes[3]
    numbers = torch.empty((2, 2, n), dtype=torch.int32, device=blocks.device)
    torch.bitwise_and(first, number(0x3F3F3F3F), out=numbers[0])
    torch.bitwise_and(last, number(0x0F0F0F0F), out=numbers[1, 0])
    torch.bitwise_and(last >> number(4), number(0x0F0F0F0F), out=numbers[1, 1])
    numbers[1] |= (first >> number(2)) & number(0x30303030)
    scaled = numbers.permute(2, 1, 0).contiguous().view(torch.uint8).view(n, 2, 8).float()
    scaled *= planes[0].view(torch.float16).float().view(n, 2, 1)
    return scaled[:, 0], scaled[:, 1]


class Q2_K(Format):
    """scales 16 bytes | qs 64 bytes | d f16 | dmin f16.

    Sixteen sub-blocks of 16 weights: (d * low nibble) * q - (dmin * high nibble). Weight 128h + 32k + j is in
    bits 2k, 2k+1 of qs[32h + j].
    """

    ggml_type, block_size, block_bytes = 10, 256, 84
    searches = True

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        d, dmin = half_floats(blocks[:, 80:]).unsqueeze(2)
        scales = blocks[:, :16].contiguous()
        qs = column_words(blocks, 16, 80, scratch, "qs").view(-1, 4)
        codes = scratch.get("codes", (len(qs), 4, 4), torch.int64)
        for k in range(4):
            extract(qs, 2 * k, 3, codes[:, k], scratch)
        scale_codes(codes.view(torch.uint8), (scales & number(15)) * d, out, (scales >> number(4)) * dmin)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return encode_q2_k(values, importance)


class Q3_K(Format):
    """hmask 32 bytes | qs 64 bytes | scales 12 bytes | d f16.

    Sixteen sub-blocks of 16 weights: (d * (scale - 32)) * (q - 4). Weight 128h + 32k + j has its low 2 bits
    in bits 2k, 2k+1 of qs[32h + j] and its third in bit 4h + k of hmask[j]. Scale i has its low 4 bits in
    nibble i // 8 of scales[i % 8] and its high 2 bits in bits 2 * (i // 4) of scales[8 + i % 4].
    """

    ggml_type, block_size, block_bytes = 11, 256, 110
    searches = True

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        n = blocks.shape[0]
        low, high = blocks[:, 96:104], blocks[:, 104:108]
        four, two = number(4), number(2)
        scales = torch.cat([high << four, high << two, high, high >> two], dim=1).bitwise_and_(number(48))
        scales |= torch.cat([low & number(15), low >> four], dim=1)
        scale = scales.view(torch.int8).sub_(number(32)) * (half_floats(blocks[:, 108:]).t() / number(32))

        qs = column_words(blocks, 32, 96, scratch, "qs").view(-1, 4)
        mask = column_words(blocks, 0, 32, scratch, "hmask").bitwise_not_()
        third = scratch.get("third", (n, 2, 4), torch.int64)
        torch.bitwise_left_shift(mask, number(4), out=third[:, 0])
        third[:, 1].copy_(mask)
        third = third.view(
            -1, 4
        )  # bit 4 + k of each byte: the inverted third bit of weight 32k + j of its half
        bits = scratch.get("bits", (2, *third.shape), torch.int64)
        codes = scratch.get("codes", (len(qs), 4, 4), torch.int64)
        for k in range(4):
            extract(third, k - 3, 0x80, bits[0], scratch)
            extract(qs, 2 * k - 5, 0x60, bits[1], scratch)
            torch.bitwise_or(bits[0], bits[1], out=codes[:, k])
        scale_codes(codes.view(torch.int8), scale, out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return encode_q3_k(values, importance)


class Q4_K(Format):
    """d f16 | dmin f16 | scales 12 bytes | qs 128 bytes.

    Eight sub-blocks of 32 weights: (d * scale) * q - (dmin * min). Bytes 32k..32k+31 of qs hold sub-block 2k
    in their low and 2k+1 in their high nibbles.
    """

    ggml_type, block_size, block_bytes = 12, 256, 144
    searches = True

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        scale, minimum = _scales_and_minima(blocks)
        qs = column_words(blocks, 16, 144, scratch, "qs").view(-1, 4)
        codes = scratch.get("codes", (len(qs), 2, 4), torch.int64)
        extract(qs, 0, 15, codes[:, 0], scratch)
        extract(qs, 4, 15, codes[:, 1], scratch)
        scale_codes(codes.view(torch.uint8), scale, out, minimum)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return encode_q4_k(values, importance)


class Q5_K(Format):
    """d f16 | dmin f16 | scales 12 bytes | qh 32 bytes | qs 128 bytes.

    As Q4_K; sub-block i (of 32 weights) has its fifth bits in bit i of qh[j].
    """

    ggml_type, block_size, block_bytes = 13, 256, 176
    searches = True

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        scale, minimum = _scales_and_minima(blocks)
        qs = column_words(blocks, 48, 176, scratch, "qs").view(-1, 4)
        qh = column_words(blocks, 16, 48, scratch, "qh")
        fifth = scratch.get("fifth", (len(qh), 4, 4), torch.int64)
        for k in range(4):
            torch.bitwise_right_shift(qh, number(2 * k), out=fifth[:, k])
        fifth = fifth.view(-1, 4)  # bits 0 and 1 of each byte: of the weights in the low and the high nibble
        bits = scratch.get("bits", (2, *fifth.shape), torch.int64)
        codes = scratch.get("codes", (len(qs), 2, 4), torch.int64)
        for half in range(2):
            extract(fifth, half - 4, 16, bits[0], scratch)
            extract(qs, 4 * half, 15, bits[1], scratch)
            torch.bitwise_or(bits[0], bits[1], out=codes[:, half])
        scale_codes(codes.view(torch.uint8), scale, out, minimum)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return encode_q5_k(values, importance)


class Q6_K(Format):
    """ql 128 bytes | qh 64 bytes | scales 16 x int8 | d f16.

    Sixteen sub-blocks of 16 weights: (d * scale) * (q - 32). Weight 128h + 32k + j has its low 4 bits in
    nibble k // 2 of ql[64h + 32 * (k % 2) + j] and its high 2 bits in bits 2k, 2k+1 of qh[32h + j].
    """

    ggml_type, block_size, block_bytes = 14, 256, 210
    searches = True

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        scale = blocks[:, 192:208].view(torch.int8) * (half_floats(blocks[:, 208:]).t() / number(4))
        ql = column_words(blocks, 0, 128, scratch, "ql").view(-1, 8)
        qh = column_words(blocks, 128, 192, scratch, "qh").view(-1, 4)
        qh ^= splat(0xAA)
        codes = scratch.get("codes", (len(qh), 4, 4), torch.int64)
        high = scratch.get("high", codes.shape, torch.int64)
        for k in range(4):
            extract(qh, 2 * k - 6, 0xC0, high[:, k], scratch)
        halves = codes.view(-1, 2, 8)
        extract(ql, -2, 0x3C, halves[:, 0], scratch)
        extract(ql, 2, 0x3C, halves[:, 1], scratch)
        codes |= high
        scale_codes(codes.view(torch.int8), scale, out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return encode_q6_k(values, importance)
