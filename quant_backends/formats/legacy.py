"""ggml's first formats: blocks of 32 weights with one float16 scale `d` (and a minimum `m` in the _1 types).

Layouts: `block_q4_0` … `block_q8_0` in ggml-common.h; the order of operations follows the gguf package, to
which results are equal bit for bit. Blocks are too small to be cut apart cheaply, so all bytes of a chunk,
headers included, are unpacked together and only the last step skips the headers.
"""

from __future__ import annotations

import torch

from .base import Format, Scratch
from .encoding import by_largest, by_magnitude, by_range, half_bytes, pack_fifth_bits, pack_nibbles
from .tables import bit_bytes, lookup
from .words import all_words, extract, half_floats, number, splat


def _nibble_floats(
    blocks: torch.Tensor, scratch: Scratch, flip: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high nibbles of every byte as float32 [n, block_bytes].

    With `flip` = 8 the nibble counts from -8 to 7 and comes multiplied by 16: its top bit is flipped and it
    is read as the top half of an int8, which saves a pass for the subtraction.
    """
    words = all_words(blocks, scratch)
    nibbles = scratch.get("nibbles", (2, words.numel()), torch.int64)
    if flip:
        words = torch.bitwise_xor(words, splat(0x88), out=scratch.get("flipped", words.shape, torch.int64))
    extract(words, -4 if flip else 0, 0xF0 if flip else 0x0F, nibbles[0], scratch)
    extract(words, 0 if flip else 4, 0xF0 if flip else 0x0F, nibbles[1], scratch)
    codes = nibbles.view(torch.int8)
    floats = scratch.get("floats", codes.shape, torch.float32).copy_(codes)
    low, high = floats[:, : blocks.numel()].view(2, *blocks.shape)
    return low, high


def _fifth_bits(qh: torch.Tensor, clear: int, scratch: Scratch) -> torch.Tensor:
    """`clear` or `clear` + 16 for each of the 32 bits of qh (uint8 [n, 4]): int8 [n, 32]."""
    index = scratch.get("index", (qh.shape[0], 4), torch.int32).copy_(qh)
    return lookup(bit_bytes(clear, clear + 16, qh.device), index, scratch, "bits").view(-1, 32)


class Q4_0(Format):
    """d f16 | qs 16 bytes: weight j in the low, weight j+16 in the high nibble of byte j; d * (q - 8)."""

    ggml_type, block_size, block_bytes = 2, 32, 18

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        d = half_floats(blocks[:, :2]).t() / number(16)
        low, high = _nibble_floats(blocks, scratch, flip=8)
        torch.mul(low[:, 2:], d, out=out[:, :16])
        torch.mul(high[:, 2:], d, out=out[:, 16:])

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        scale, codes = by_largest(values, 16)
        return torch.cat([half_bytes(scale), pack_nibbles(codes)], dim=1)


class Q4_1(Format):
    """d f16 | m f16 | qs 16 bytes as in Q4_0; d * q + m."""

    ggml_type, block_size, block_bytes = 3, 32, 20

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        d, m = half_floats(blocks[:, :4]).unsqueeze(2)
        low, high = _nibble_floats(blocks, scratch)
        torch.mul(low[:, 4:], d, out=out[:, :16])
        torch.mul(high[:, 4:], d, out=out[:, 16:])
        out.add_(m)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        scale, minimum, codes = by_range(values, 16)
        return torch.cat([half_bytes(scale), half_bytes(minimum), pack_nibbles(codes)], dim=1)


class Q5_0(Format):
    """d f16 | qh 4 bytes: bit j is the fifth bit of weight j | qs 16 bytes as in Q4_0; d * (q - 16)."""

    ggml_type, block_size, block_bytes = 6, 32, 22

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        low, high = _nibble_floats(blocks, scratch)
        out.copy_(_fifth_bits(blocks[:, 2:6], -16, scratch))
        out[:, :16] += low[:, 6:]
        out[:, 16:] += high[:, 6:]
        out.mul_(half_floats(blocks[:, :2]).t())

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        scale, codes = by_largest(values, 32)
        return torch.cat([half_bytes(scale), pack_fifth_bits(codes), pack_nibbles(codes)], dim=1)


class Q5_1(Format):
    """d f16 | m f16 | qh 4 bytes and qs 16 bytes as in Q5_0; d * q + m."""

    ggml_type, block_size, block_bytes = 7, 32, 24

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        d, m = half_floats(blocks[:, :4]).unsqueeze(2)
        low, high = _nibble_floats(blocks, scratch)
        out.copy_(_fifth_bits(blocks[:, 4:8], 0, scratch))
        out[:, :16] += low[:, 8:]
        out[:, 16:] += high[:, 8:]
        out.mul_(d).add_(m)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        scale, minimum, codes = by_range(values, 32)
        parts = [half_bytes(scale), half_bytes(minimum), pack_fifth_bits(codes), pack_nibbles(codes)]
        return torch.cat(parts, dim=1)


class Q8_0(Format):
    """d f16 | qs 32 x int8; d * q."""

    ggml_type, block_size, block_bytes = 8, 32, 34

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        floats = scratch.get("floats", blocks.shape, torch.float32).copy_(blocks.view(torch.int8))
        torch.mul(floats[:, 2:], half_floats(blocks[:, :2]).t(), out=out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        scale, codes = by_magnitude(values, 127)
        return torch.cat([half_bytes(scale), codes.view(torch.uint8)], dim=1)
