"""ComfyUI's own formats (comfy.quant_ops.QUANT_ALGOS), described in the metadata, which all its versions read.

Layers that multiply in 8 bits are among them as far as ComfyUI has the like. Others are in a format that it does not
know and therefore refuses: `readers/activation_keys.py` has both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..core.packed import PackedTensor
from ..formats.eight_bit_products import EightBitProducts
from ..formats.outlier_products import OutlierProducts
from ..formats.scaled import RotatedRows, ScaledElements
from ..readers import activation_keys
from .stored import FLOAT8, WHOLE, AnyFormat, Stored, Tensors, is_elements, layer_of


def core_scale(packed: PackedTensor) -> torch.Tensor:
    scale = packed.parts["scale"].float()
    is_one = isinstance(packed.format, ScaledElements) and packed.format.block == (0, 0)
    if is_one or _is_float8_product(packed.format):
        return scale.view(())
    return scale.view(-1, *[1] * (len(packed.shape) - 1))


def _is_float8_product(fmt: AnyFormat) -> bool:
    return isinstance(fmt, EightBitProducts) and fmt.stored == "float8_e4m3fn"


def holds_core(fmt: AnyFormat) -> bool:
    return (
        isinstance(fmt, RotatedRows)
        or fmt == EightBitProducts("int8")
        or _is_float8_product(fmt)
        or is_elements(fmt, FLOAT8, ((0, 0),))
        or is_elements(fmt, ("int8",), WHOLE)
    )


def store_core(name: str, packed: PackedTensor, dtype: torch.dtype) -> Tensors:
    layer = layer_of(name)
    tensors = {name: packed.data.view(packed.shape)}
    if _is_own(packed.format):
        own = {f"{layer}{activation_keys.OWN_PART}{part}": value for part, value in packed.parts.items()}
        return {**tensors, **own}
    tensors[f"{layer}.weight_scale"] = core_scale(packed)
    if "step" in packed.parts:
        tensors[f"{layer}.input_scale"] = packed.parts["step"].view(())
    return tensors


def describe_core(weights: Mapping[str, Stored], plain: list[str]) -> dict[str, str]:
    layers: dict[str, dict[str, Any]] = {}
    for name, stored in weights.items():
        fmt = stored.format
        described: dict[str, Any] = {"format": "int8_tensorwise"}
        if isinstance(fmt, RotatedRows):
            described |= {"convrot": True, "convrot_groupsize": fmt.group_size}
        elif _is_own(fmt):
            described = {"format": activation_keys.FORMAT}
        elif isinstance(fmt, ScaledElements | EightBitProducts) and fmt.stored != "int8":
            described = {"format": fmt.stored}
        layers[layer_of(name)] = described
    if not layers:
        return {}
    found = json.dumps({"format_version": "1.0", "layers": layers})
    # Also where there is nothing to say of inputs: Snug then loads the file itself, on every version of ComfyUI.
    activations = {activation_keys.METADATA: "{}", **describe_activations(weights, plain)}
    return {"_quantization_metadata": found, **activations}


def _is_own(fmt: AnyFormat) -> bool:
    return isinstance(fmt, EightBitProducts) and fmt.stored == "int8" and fmt.activations != "dynamic"


def holds_own(fmt: AnyFormat) -> bool:
    return isinstance(fmt, EightBitProducts)


def describe_activations(weights: Mapping[str, Stored], plain: list[str]) -> dict[str, str]:
    """How layers round their input, in files of any convention: metadata that only Snug reads."""
    kinds: dict[str, str] = {}
    for name, stored in weights.items():
        if isinstance(stored.format, EightBitProducts):
            kinds[layer_of(name)] = stored.format.activations
        elif isinstance(stored.format, OutlierProducts):
            kinds[layer_of(name)] = f"{activation_keys.OUTLIERS}{stored.format.number}"
    return {activation_keys.METADATA: json.dumps(kinds)} if kinds else {}
