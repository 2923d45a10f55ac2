"""Decoding as one opaque operation for torch.compile.

A compiler that traces into the decoders stumbles over their scratch memory, which is viewed in several dtypes,
and would gain nothing: they are bound by memory. As a registered operation with a fake implementation the
decoding is one node of the graph, whatever the format.
"""

from __future__ import annotations

import torch

from ..core.packed import PackedTensor
from ..formats.scaled import ScaledFormat, format_called
from .dequantize import dequantize_packed

NAME = "snug::dequantize"


def traced_dequantize(packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize_packed(packed, dtype)` for code that is being compiled."""
    parts = list(packed.parts.values())
    return torch.ops.snug.dequantize(packed.data, parts, packed.format.name, list(packed.shape), dtype)


def _decode(
    data: torch.Tensor, parts: list[torch.Tensor], format: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    fmt = format_called(format)
    names = fmt.part_names if isinstance(fmt, ScaledFormat) else ()
    return dequantize_packed(
        PackedTensor(data, fmt, tuple(shape), dict(zip(names, parts, strict=True))), dtype
    )


def _shape_only(
    data: torch.Tensor, parts: list[torch.Tensor], format: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    return data.new_empty(shape, dtype=dtype)


# The pack may be imported twice under different names; an operation can be registered once.
if not hasattr(torch.ops.snug, "dequantize"):
    torch.library.custom_op(NAME, _decode, mutates_args=()).register_fake(_shape_only)
