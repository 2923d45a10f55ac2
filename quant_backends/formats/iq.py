"""ggml's IQ formats of 1 to 3 bits: 256 weights, in runs of 8 (or 4) that are vectors of a fixed grid.

Layouts: `block_iq1_s` … `block_iq3_s` in ggml-common.h; the order of operations follows the gguf package, to
which results are equal bit for bit. A grid vector and its eight signs are looked up as one integer each.
"""

from __future__ import annotations

import torch

from .base import Format, Scratch
from .iq_tables import grid_table
from .tables import bit_bytes, delta_grid, lookup, shifts, sign_bytes
from .words import column_words, half_floats, number, scale_codes


def _nibbles(columns: torch.Tensor) -> torch.Tensor:
    """The nibbles of uint8 [n, k], low before high: uint8 [n, 2k]."""
    pairs = columns.unsqueeze(2) >> shifts(0, 4, 2, torch.uint8, columns.device)
    return pairs.view(columns.shape[0], -1).bitwise_and_(number(15))


def _index(blocks: torch.Tensor, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
    """Bytes start..stop-1 of each block as indices: int32 [n, stop - start]."""
    return scratch.get("index", (blocks.shape[0], stop - start), torch.int32).copy_(blocks[:, start:stop])


def _high_bits(
    blocks: torch.Tensor, start: int, count: int, per_byte: int, bits: int, scratch: Scratch
) -> torch.Tensor:
    """Bits 8 and up of the indices, in place: `per_byte` fields of `bits` bits from each of `count` bytes."""
    qh = blocks[:, start : start + count].int().unsqueeze(2)
    fields = scratch.get("high", (blocks.shape[0], count, per_byte), torch.int32)
    torch.bitwise_right_shift(qh, shifts(0, bits, per_byte, torch.int32, blocks.device), out=fields)
    fields.bitwise_and_(number((1 << bits) - 1)).bitwise_left_shift_(number(8))
    return fields.view(blocks.shape[0], -1)


def _decode(
    grid: str,
    index: torch.Tensor,
    signs: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    """out = scale * grid vector * signs."""
    codes = lookup(grid_table(grid, out.device), index, scratch, "codes")
    scale_codes(codes.mul_(signs), scale, out)


def _sign_fields(aux: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Signs from four 7-bit fields of each 32-bit word (int32 [n, 8]): int8, one per weight."""
    fields = scratch.get("fields", (aux.shape[0], 8, 4), torch.int32)
    torch.bitwise_right_shift(aux.unsqueeze(2), shifts(0, 7, 4, torch.int32, aux.device), out=fields)
    fields &= number(127)
    return lookup(sign_bytes(aux.device), fields, scratch, "signs")


def _top_nibble(aux: torch.Tensor) -> torch.Tensor:
    """The 4-bit scale above the sign fields."""
    return (aux >> number(28)) & number(15)


class IQ2_XXS(Format):
    """d f16 | eight times: 4 index bytes, u32 with four 7-bit sign fields and a 4-bit scale on top.

    Runs of 8 weights: d * (0.5 + scale) * 0.25 * grid * sign; a field's eighth sign makes parity even.
    """

    ggml_type, block_size, block_bytes = 16, 256, 66

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        n = blocks.shape[0]
        pairs = column_words(blocks, 2, 66, scratch, "pairs").view(torch.int32).view(n, 8, 2)
        aux = pairs[:, :, 1]
        scale = half_floats(blocks[:, :2]).t() * (_top_nibble(aux) + number(0.5)) * number(0.25)
        index = scratch.get("index", (n, 8, 4), torch.int32)
        index.copy_(pairs.view(torch.uint8).view(n, 8, 8)[:, :, :4])
        _decode(cls.name, index, _sign_fields(aux, scratch), scale, out, scratch)


class IQ2_XS(Format):
    """d f16 | qs 32 x u16: 9-bit index, 7-bit sign field | scales 8 bytes, a nibble for each 16 weights.

    Runs of 8 weights: d * (0.5 + scale) * 0.25 * grid * sign.
    """

    ggml_type, block_size, block_bytes = 17, 256, 74

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        shape = (blocks.shape[0], 32)
        scale = half_floats(blocks[:, :2]).t() * (_nibbles(blocks[:, 66:]) + number(0.5)) * number(0.25)
        qs = scratch.get("qs", shape, torch.int32).copy_(blocks[:, 2:66].view(torch.int16))
        field = torch.bitwise_right_shift(qs, number(9), out=scratch.get("fields", shape, torch.int32))
        signs = lookup(sign_bytes(blocks.device), field.bitwise_and_(number(127)), scratch, "signs")
        _decode(cls.name, qs.bitwise_and_(number(511)), signs, scale, out, scratch)


class IQ2_S(Format):
    """d f16 | qs 32 bytes | signs 32 bytes | qh 8 bytes | scales 8 bytes, a nibble for each 16 weights.

    Runs of 8 weights: d * (0.5 + scale) * 0.25 * grid * sign; an index has its low 8 bits in qs and its high
    2 bits in qh, four to a byte.
    """

    ggml_type, block_size, block_bytes = 22, 256, 82

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        scale = half_floats(blocks[:, :2]).t() * (_nibbles(blocks[:, 74:]) + number(0.5)) * number(0.25)
        index = _index(blocks, 34, 66, scratch)
        signs = lookup(bit_bytes(1, -1, blocks.device), index, scratch, "signs")
        index = _index(blocks, 2, 34, scratch)
        index |= _high_bits(blocks, 66, 8, 4, 2, scratch)
        _decode(cls.name, index, signs, scale, out, scratch)


class IQ3_XXS(Format):
    """d f16 | qs 64 index bytes | 8 x u32 with four 7-bit sign fields and a 4-bit scale on top.

    Runs of 4 weights: d * (0.5 + scale) * 0.5 * grid * sign.
    """

    ggml_type, block_size, block_bytes = 18, 256, 98

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        aux = column_words(blocks, 66, 98, scratch, "aux").view(torch.int32)
        scale = half_floats(blocks[:, :2]).t() * (_top_nibble(aux) + number(0.5)) * number(0.5)
        index = _index(blocks, 2, 66, scratch)
        _decode(cls.name, index, _sign_fields(aux, scratch), scale, out, scratch)


class IQ3_S(Format):
    """d f16 | qs 64 bytes | qh 8 bytes | signs 32 bytes | scales 4 bytes, a nibble for each 32 weights.

    Runs of 4 weights: d * (1 + 2 * scale) * grid * sign; an index has its low 8 bits in qs, its ninth in qh.
    """

    ggml_type, block_size, block_bytes = 21, 256, 110

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        scale = half_floats(blocks[:, :2]).t() * (_nibbles(blocks[:, 106:]) * number(2) + number(1))
        signs = lookup(bit_bytes(1, -1, blocks.device), _index(blocks, 74, 106, scratch), scratch, "signs")
        index = _index(blocks, 2, 66, scratch)
        index |= _high_bits(blocks, 66, 8, 8, 1, scratch)
        _decode(cls.name, index, signs, scale, out, scratch)


class IQ1_S(Format):
    """d f16 | qs 32 bytes | qh 8 x u16: four 3-bit high index parts, 3-bit scale, sign of delta on top.

    Runs of 8 weights: d * (2 * scale + 1) * (grid ± 0.125).
    """

    ggml_type, block_size, block_bytes = 19, 256, 50

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        n, device = blocks.shape[0], blocks.device
        qh = blocks[:, 34:].view(torch.int16).int()
        factor = ((qh >> number(12)) & number(7)) * number(2) + number(1)
        scale = half_floats(blocks[:, :2]).t() / number(8) * factor
        high = scratch.get("high", (n, 8, 4), torch.int32)
        torch.bitwise_right_shift(qh.unsqueeze(2), shifts(0, 3, 4, torch.int32, device), out=high)
        high.bitwise_and_(number(7)).bitwise_left_shift_(number(8))
        high |= (qh >> number(4)).bitwise_and_(number(2048)).unsqueeze(2)
        index = _index(blocks, 2, 34, scratch)
        index |= high.view(n, 32)
        scale_codes(lookup(delta_grid(device), index, scratch, "codes"), scale, out)


class IQ1_M(Format):
    """qs 32 bytes | qh 16 bytes: a nibble per run, 3-bit high index part, sign of delta | scales 4 x u16.

    Runs of 8 weights: d * (2 * scale + 1) * (grid ± 0.125), a 3-bit scale for each 16 weights: four in the
    low 12 bits of each u16, whose top nibbles together are d (f16, lowest nibble first).
    """

    ggml_type, block_size, block_bytes = 29, 256, 56

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        n, device = blocks.shape[0], blocks.device
        packed = blocks[:, 48:].view(torch.int16).int()
        d = ((packed >> number(12)) & number(15)) << shifts(0, 4, 4, torch.int32, device)
        d = d.sum(1, dtype=torch.int32).to(torch.int16).view(torch.float16).float().unsqueeze(1)
        factor = (packed.unsqueeze(2) >> shifts(0, 3, 4, torch.int32, device)).view(n, 16)
        scale = d / number(8) * ((factor & number(7)) * number(2) + number(1))
        index = _index(blocks, 0, 32, scratch)
        index |= _nibbles(blocks[:, 32:48]).int() << number(8)
        scale_codes(lookup(delta_grid(device), index, scratch, "codes"), scale, out)
