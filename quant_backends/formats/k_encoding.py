"""Encoders of K-quants, IQ4_NL and IQ4_XS: the search for scales and codes, then their bits in the layouts of ggml.

values: float32 [n, block_size]; importance: as `Format.encode`. Each returns blocks, uint8 [n, block_bytes].
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import torch

from .encoding import half_bytes
from .level_blocks import refit_level_blocks
from .search import Affine, Nearest, Symmetric, fit_affine, fit_symmetric

Importance: TypeAlias = "torch.Tensor | None"


def _around(center: float, width: float, count: int) -> list[float]:
    """`count` numbers from center - width to center + width; the center is one of them when the count is odd."""
    return [center + width * (2 * number / (count - 1) - 1) for number in range(count)]


def encode_q2_k(values: torch.Tensor, importance: Importance) -> torch.Tensor:
    found = fit_affine(values, importance, 16, 3, 15, _around(3.0, 0.7, 11))
    scales = found.scales.to(torch.uint8) | found.minima.to(torch.uint8) << 4
    return torch.cat([scales, _pack_pairs(found.codes), half_bytes(found.d), half_bytes(found.dmin)], dim=1)


def encode_q3_k(values: torch.Tensor, importance: Importance) -> torch.Tensor:
    found = fit_symmetric(values, importance, 16, _integers(-4, 3), (-32, 31), _around(-4.0, 1.4, 15))
    found = refit_level_blocks(found, values, importance, 16, (-4, 3), (-32, 31))
    codes = (found.levels + 4).to(torch.uint8)
    mask = _pack_bits(codes >> 2)
    scales = (found.scales + 32).to(torch.uint8)
    low = (scales[:, :8] & 15) | scales[:, 8:] << 4
    top = (scales >> 4).view(-1, 4, 4)
    high = top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4 | top[:, 3] << 6
    return torch.cat([mask, _pack_pairs(codes & 3), low, high, half_bytes(found.d)], dim=1)


def encode_q4_k(values: torch.Tensor, importance: Importance) -> torch.Tensor:
    found = fit_affine(values, importance, 32, 15, 63, _around(15.0, 1.0, 11))
    return torch.cat([*_affine_head(found), _pack_halves(found.codes, 32)], dim=1)


def encode_q5_k(values: torch.Tensor, importance: Importance) -> torch.Tensor:
    found = fit_affine(values, importance, 32, 31, 63, _around(30.5, 1.5, 11))
    fifth = _pack_bits(found.codes >> 4)
    return torch.cat([*_affine_head(found), fifth, _pack_halves(found.codes & 15, 32)], dim=1)


def encode_q6_k(values: torch.Tensor, importance: Importance) -> torch.Tensor:
    found = fit_symmetric(values, importance, 16, _integers(-32, 31), (-128, 127), _around(-31.5, 1.5, 9))
    codes = (found.levels + 32).to(torch.uint8)
    # Of each half of a block, weights 0-63 are in the low nibbles and weights 64-127 in the high ones.
    scales = found.scales.to(torch.int8).view(torch.uint8)
    return torch.cat(
        [_pack_halves(codes & 15, 64), _pack_pairs(codes >> 4), scales, half_bytes(found.d)], dim=1
    )


def encode_iq4_nl(values: torch.Tensor, importance: Importance, table: tuple[int, ...]) -> torch.Tensor:
    found = fit_symmetric(
        values,
        importance,
        32,
        functools.partial(_to_table, table),
        (1, 1),
        _table_candidates(table),
        zero_level=False,
    )
    codes = _table_codes(found, table)
    return torch.cat([half_bytes(found.d), _pack_halves(codes, 16)], dim=1)


def encode_iq4_xs(values: torch.Tensor, importance: Importance, table: tuple[int, ...]) -> torch.Tensor:
    found = fit_symmetric(
        values,
        importance,
        32,
        functools.partial(_to_table, table),
        (-32, 31),
        _table_candidates(table),
        zero_level=False,
    )
    scales = (found.scales + 32).to(torch.int32)
    low = (scales[:, 0::2] & 15 | (scales[:, 1::2] & 15) << 4).to(torch.uint8)
    high = ((scales >> 4) << torch.arange(0, 16, 2, device=values.device)).sum(1, keepdim=True)
    high = torch.cat([high & 255, high >> 8], dim=1).to(torch.uint8)
    codes = _table_codes(found, table)
    return torch.cat([half_bytes(found.d), high, low, _pack_halves(codes, 16)], dim=1)


def _table_candidates(table: tuple[int, ...]) -> list[float]:
    """The table reaches further down than up, and its ends are far from their neighbours: both signs are tried."""
    return _around(table[0] + 5, 22.0, 11) + _around(table[-1] + 3, 22.0, 9)


def _affine_head(found: Affine) -> tuple[torch.Tensor, ...]:
    """d, dmin and the twelve bytes of eight 6-bit scales and minima of Q4_K and Q5_K."""
    scales, minima = found.scales.to(torch.uint8), found.minima.to(torch.uint8)
    packed = (
        scales[:, :4] | (scales[:, 4:] >> 4) << 6,
        minima[:, :4] | (minima[:, 4:] >> 4) << 6,
        scales[:, 4:] & 15 | minima[:, 4:] << 4,
    )
    return half_bytes(found.d), half_bytes(found.dmin), *packed


def _pack_halves(codes: torch.Tensor, run: int) -> torch.Tensor:
    """Codes below 16 (uint8 [n, k]): each `run` is the low nibbles and the next one the high nibbles of its bytes."""
    low, high = codes.view(len(codes), -1, 2, run).unbind(2)
    return (low | high << 4).view(len(codes), -1)


def _pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Codes below 4 (uint8 [n, 256]) as [n, 64]: weight 128h + 32k + j in bits 2k, 2k+1 of byte 32h + j."""
    a, b, c, d = codes.view(len(codes), 2, 4, 32).unbind(2)
    return (a | b << 2 | c << 4 | d << 6).view(len(codes), 64)


def _pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bits (uint8 [n, 256], 0 or 1) as [n, 32]: weight 32i + j in bit i of byte j."""
    rows = bits.view(len(bits), 8, 32).unbind(1)
    return functools.reduce(torch.bitwise_or, [row << number for number, row in enumerate(rows)])


def _integers(least: int, most: int) -> Nearest:
    def nearest(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.round_().clamp_(least, most)

    return nearest


# Cells of equal width for each unit of a table's values: a number's cell says what it is nearest to.
_CELLS = 4


@functools.cache
def _cells(table: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest value of `table` (float32) and its index (uint8) for cells of numbers from -128 to 128."""
    middle = (torch.arange(256 * _CELLS) + 0.5) / _CELLS - 128
    values = torch.tensor(table, dtype=torch.float32)
    index = (middle.unsqueeze(1) - values).abs().argmin(1)
    return values[index].to(device), index.to(torch.uint8).to(device)


def _cell_numbers(numbers: torch.Tensor) -> torch.Tensor:
    return ((numbers + 128) * _CELLS).clamp_(0, 256 * _CELLS - 1).to(torch.int32).view(-1)


def _to_table(table: tuple[int, ...], numbers: torch.Tensor) -> torch.Tensor:
    cells, _ = _cells(table, numbers.device)
    torch.index_select(cells, 0, _cell_numbers(numbers), out=numbers.view(-1))
    return numbers


def _table_codes(found: Symmetric, table: tuple[int, ...]) -> torch.Tensor:
    _, index = _cells(table, found.levels.device)
    return index.index_select(0, _cell_numbers(found.levels)).view(found.levels.shape)
