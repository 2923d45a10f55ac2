"""Lookup tables, built once per device and shared by the formats.

Tables map a small index to several weights at once, packed into one integer, so that one lookup of
`torch.index_select` yields up to eight weights.
"""

from __future__ import annotations

import functools

import torch

from .base import Scratch
from .iq_tables import grid_table


@functools.cache
def bit_bytes(clear: int, set_: int, device: torch.device) -> torch.Tensor:
    """int64 [256]: byte k of entry b is `set_` where bit k of b is set, else `clear` (both as int8)."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return torch.where(bits == 1, set_, clear).to(torch.int8).view(torch.int64).view(-1).to(device)


@functools.cache
def sign_bytes(device: torch.device) -> torch.Tensor:
    """int64 [128]: the eight signs (int8, 1 or -1) of a 7-bit field, bit 7 making their parity even."""
    field = torch.arange(128)
    ones = (field.unsqueeze(1) >> torch.arange(7) & 1).sum(1)
    return bit_bytes(1, -1, torch.device("cpu"))[field | (ones & 1) << 7].to(device)


@functools.cache
def delta_grid(device: torch.device) -> torch.Tensor:
    """int64 [4096]: eight times the IQ1 grid vectors plus 0.125 (first half) or minus it (second half)."""
    grid = grid_table("IQ1_S", torch.device("cpu")).view(torch.int8) * 8
    return torch.cat([grid + 1, grid - 1]).view(torch.int64).to(device)


@functools.cache
def shifts(start: int, step: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`count` shift distances from `start` on, to unpack several fields of one number at once."""
    return torch.arange(start, start + step * count, step, dtype=dtype, device=device)


@functools.cache
def nibble_pairs(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [3856]: entry lo + 256 * hi is the two float32 numbers values[lo], values[hi] (lo, hi < 16)."""
    index = torch.arange(16 * 256 - 240)
    table = torch.tensor(values, dtype=torch.float32)
    pairs = torch.stack([table[index & 15], table[index >> 8]], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)


def lookup(table: torch.Tensor, index: torch.Tensor, scratch: Scratch, key: str) -> torch.Tensor:
    """table[index] as int8, in the order of `index` (int32, contiguous); `table` is 1-D of any integer."""
    out = scratch.get(key, (index.numel(),), table.dtype)
    return torch.index_select(table, 0, index.view(-1), out=out).view(torch.int8)
