"""Decoding as one opaque operation for torch.compile.

A compiler that traces into the decoders stumbles over their scratch memory, which is viewed in several dtypes,
and would gain nothing: they are bound by memory. As a registered operation with a fake implementation the
decoding is one node of the graph, whatever the format.
"""

from __future__ import annotations

import torch

from ..formats import FORMATS
from .dequantize import dequantize

NAME = "snug::dequantize"


def _decode(data: torch.Tensor, format: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return dequantize(data, FORMATS[format], shape, dtype)


def _shape_only(data: torch.Tensor, format: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return data.new_empty(shape, dtype=dtype)


# The pack may be imported twice under different names; an operation can be registered once.
if not hasattr(torch.ops.snug, "dequantize"):
    torch.library.custom_op(NAME, _decode, mutates_args=()).register_fake(_shape_only)
traced_dequantize = torch.ops.snug.dequantize.default
