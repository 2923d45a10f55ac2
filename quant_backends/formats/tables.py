"""Lookup tables, built once per device and shared by the formats.

Tables map a small index to several weights at once, packed into one integer, so that one lookup of
`torch.index_select` yields up to eight weights.
"""

from __future__ import annotations

import functools

import torch

from .base import Scratch


@functools.lru_cache(maxsize=None)
def bit_bytes(clear: int, set_: int, device: torch.device) -> torch.Tensor:
    """int64 [256]: byte k of entry b is `set_` where bit k of b is set, else `clear` (both as int8)."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return torch.where(bits == 1, set_, clear).to(torch.int8).view(torch.int64).view(-1).to(device)


@functools.lru_cache(maxsize=None)
def nibble_pairs(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [3856]: entry lo + 256 * hi is the two float32 numbers values[lo], values[hi] (lo, hi < 16)."""
    index = torch.arange(16 * 256 - 240)
    table = torch.tensor(values, dtype=torch.float32)
    pairs = torch.stack([table[index & 15], table[index >> 8]], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)


def lookup(table: torch.Tensor, index: torch.Tensor, scratch: Scratch, key: str) -> torch.Tensor:
    """table[index] as bytes: int8, in the order of `index` (int32, contiguous); `table` is 1-D of any integer."""
    out = scratch.get(key, (index.numel(),), table.dtype)
    return torch.index_select(table, 0, index.view(-1), out=out).view(torch.int8)
