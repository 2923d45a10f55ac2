"""Lookup tables, built once per device and shared by the formats.

Tables map a small index to several weights at once, packed into one integer, so that one lookup of
`torch.index_select` yields up to eight weights.
"""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=None)
def bit_bytes(clear: int, set_: int, device: torch.device) -> torch.Tensor:
    """int64 [256]: byte k of entry b is `set_` where bit k of b is set, else `clear` (both as int8)."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return torch.where(bits == 1, set_, clear).to(torch.int8).view(torch.int64).view(-1).to(device)
