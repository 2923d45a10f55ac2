"""Decoding as one opaque operation for torch.compile.

A compiler that traces into the decoders stumbles over their scratch memory, which is viewed in several dtypes,
and would gain nothing: they are bound by memory. As a registered operation with a fake implementation the
decoding is one node of the graph, whatever the format.
"""

from __future__ import annotations

import torch

from ..core.packed import PackedTensor
from ..formats.scaled import format_called
from .dequantize import dequantize_packed

NAME = "snug::dequantize"


def _decode(
    data: torch.Tensor,
    parts: list[torch.Tensor],
    part_names: str,
    format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """`dequantize_packed`, given what an operation's schema can hold; part_names: joined by spaces."""
    named = dict(zip(part_names.split(), parts, strict=True))
    return dequantize_packed(PackedTensor(data, format_called(format), tuple(shape), named), dtype)


def _shape_only(
    data: torch.Tensor,
    parts: list[torch.Tensor],
    part_names: str,
    format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=data.device)


# The pack may be imported twice under different names; an operation can be registered once.
if not hasattr(torch.ops.snug, "dequantize"):
    torch.library.custom_op(NAME, _decode, mutates_args=()).register_fake(_shape_only)
traced_dequantize = torch.ops.snug.dequantize.default
