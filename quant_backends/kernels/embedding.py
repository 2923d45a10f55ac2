"""Rows of a packed table: only those that are looked up are moved and decoded.

The vocabularies of text encoders take gigabytes when they are decoded whole.
"""

from __future__ import annotations

import torch

from ..core.packed import PackedTensor
from ..formats.scaled_elements import ScaledElements
from .dequantize import dequantize_packed


def embedding(ids: torch.Tensor, table: PackedTensor, dtype: torch.dtype) -> torch.Tensor | None:
    """table[ids] in `dtype` on ids' device: ids [...] integer, table [rows, width] on any device; [..., width].

    The rows are gathered where the table lies, still packed, so an offloaded table stays where it is. None when
    the format does not store rows one after the other.
    """
    rows, width = table.shape
    fmt, parts = table.format, table.parts
    if isinstance(fmt, ScaledElements):
        by_row = {(1, 0): True, (0, 0): False}.get(fmt.block)
        if by_row is None:
            return None
    elif isinstance(fmt, type) and width % fmt.block_size == 0:
        by_row = False
    else:
        return None
    places = ids.reshape(-1).to(table.data.device)
    gathered = table.data.view(rows, -1).index_select(0, places).to(ids.device)
    if by_row:
        parts = {name: part.view(rows).index_select(0, places) for name, part in parts.items()}
    parts = {name: part.to(ids.device) for name, part in parts.items()}
    shape = (len(places), width)
    data = gathered.view(shape) if parts else gathered.view(-1)
    return dequantize_packed(PackedTensor(data, fmt, shape, parts), dtype).view(*ids.shape, width)
