"""Formats with two or three values per weight: Q1_0, TQ1_0 and TQ2_0.

Layouts: `block_q1_0`, `block_tq1_0` and `block_tq2_0` in ggml-common.h; the order of operations follows the
gguf package, to which results are equal bit for bit (Q1_0, which the package lacks, follows ggml's
`dequantize_row_q1_0`).
"""

from __future__ import annotations

import torch

from .base import Format, Scratch
from .encoding import by_magnitude, half_bytes
from .tables import bit_bytes, lookup
from .words import column_words, extract, half_floats, number, scale_codes


class TQ1_0(Format):
    """qs 48 bytes | qh 4 bytes | d f16; d * (digit - 1), where a byte holds five base-3 digits.

    Digit k of byte b is ((b * 3^k mod 256) * 3) >> 8: what a multiplication by 3 carries out. In weight order:
    five digits of qs[0:32], five of qs[32:48], four of qh, the byte running fastest.
    """

    ggml_type, block_size, block_bytes = 34, 256, 54

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        rest = scratch.get("rest", (blocks.shape[0], 52), torch.int16).copy_(blocks[:, :52])
        digit = scratch.get("digit", rest.shape, torch.int16)
        for k in range(5):
            rest *= number(3)
            torch.bitwise_right_shift(rest, number(8), out=digit).sub_(number(1))
            rest &= number(255)
            out[:, 32 * k : 32 * k + 32] = digit[:, :32]
            out[:, 160 + 16 * k : 176 + 16 * k] = digit[:, 32:48]
            if k < 4:
                out[:, 240 + 4 * k : 244 + 4 * k] = digit[:, 48:]
        out.mul_(half_floats(blocks[:, 52:]).t())

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        scale, codes = by_magnitude(values, 1)
        digits = codes.add_(1).view(torch.uint8)
        none = torch.zeros_like(digits[:, :4])
        runs = (
            digits[:, :160].split(32, 1),
            digits[:, 160:240].split(16, 1),
            (*digits[:, 240:].split(4, 1), none),
        )
        numbers = []
        for run in runs:
            number = run[0]
            for digit in run[1:]:
                number = number * 3 + digit
            numbers.append(number)
        # A fraction of 243, rounded up, in 256ths: so a digit is the carry of a multiplication by 3.
        packed = (torch.cat(numbers, dim=1).to(torch.int32) * 256 + 242) * 34522 >> 23  # divided by 243
        return torch.cat([packed.to(torch.uint8), half_bytes(scale)], dim=1)


class TQ2_0(Format):
    """qs 64 bytes | d f16; d * (q - 1). Weight 128h + 32k + j is in bits 2k, 2k+1 of qs[32h + j]."""

    ggml_type, block_size, block_bytes = 35, 256, 66

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        qs = column_words(blocks, 0, 64, scratch, "qs").view(-1, 4)
        codes = scratch.get("codes", (len(qs), 4, 4), torch.int64)
        for k in range(4):
            extract(qs, 2 * k, 3, codes[:, k], scratch)
        scale_codes(codes.view(torch.int8).sub_(number(1)), half_floats(blocks[:, 64:]), out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        scale, codes = by_magnitude(values, 1)
        a, b, c, d = codes.add_(1).view(torch.int64).view(-1, 2, 4, 4).unbind(2)
        packed = (a | b << 2 | c << 4 | d << 6).view(-1, 8).view(torch.uint8)
        return torch.cat([packed, half_bytes(scale)], dim=1)


class Q1_0(Format):
    """d f16 | qs 16 bytes: weight j is d where bit j % 8 of qs[j // 8] is set, else -d."""

    ggml_type, block_size, block_bytes = 41, 128, 18

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        index = scratch.get("index", (blocks.shape[0], 16), torch.int32).copy_(blocks[:, 2:])
        signs = lookup(bit_bytes(-1, 1, blocks.device), index, scratch, "signs")
        scale_codes(signs, half_floats(blocks[:, :2]), out)
