"""ComfyUI's plain float8 weights as packed ones: the same bytes in a format without scales.

ComfyUI merges a LoRA into such a weight and rounds the sum to float8, which loses most of it. Packed, the weight is
decoded before anything is added to it.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.formats.scaled import scaled_format
from .layout import is_packed, packed_tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Others calculate with the float8 numbers themselves, or have a scale beside them.
_PLAIN_OPERATIONS = (comfy.ops.disable_weight_init, comfy.ops.manual_cast)


def packed_weight(layer: Any) -> PackedTensor | None:
    """The weight of a layer as a packed one, sharing bytes that are packed or float8; None for other weights."""
    weight = layer.weight
    if is_packed(weight):
        return packed_tensor(weight)
    return packed_float8(layer) if is_plain_float8(layer) else None


def is_plain_float8(layer: Any) -> bool:
    """Whether the layer is ComfyUI's own and holds float8 that is cast when it is used."""
    plain = any(type(layer) is getattr(kind, type(layer).__name__, None) for kind in _PLAIN_OPERATIONS)
    return plain and type(layer.weight) is torch.nn.Parameter and _dtype(layer) in FLOAT8


def packed_float8(layer: Any) -> PackedTensor:
    """A plain float8 weight as a packed one; decoding gives the same numbers, bit for bit."""
    data = layer.weight.detach().to(_dtype(layer)).contiguous()
    fmt = scaled_format(f"{str(data.dtype).removeprefix('torch.')}-tensor")
    return PackedTensor(data, fmt, tuple(data.shape), {"scale": torch.ones((), device=data.device)})


def _dtype(layer: Any) -> torch.dtype:
    """What ComfyUI loads the weight as: with dynamic VRAM it is what the file has until it is paged in."""
    return getattr(layer, "weight_comfy_model_dtype", None) or layer.weight.dtype
