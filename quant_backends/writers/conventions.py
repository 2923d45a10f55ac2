"""How safetensors files of each convention name and describe quantized weights; `readers/*_keys.py` read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats.outlier_products import OutlierProducts
from ..formats.scaled import BitsAndBytes4Bit, QuantoGroups, ScaledElements
from .core_tensors import core_scale, describe_activations, describe_core, holds_core, holds_own, store_core
from .stored import FLOAT8, WHOLE, AnyFormat, Stored, Tensors, is_elements, layer_of
from .torchao_tensors import describe_torchao, holds_torchao, store_torchao


@dataclass(frozen=True, slots=True)
class SafetensorsConvention:
    """name: what `write_safetensors` takes; title, formats: for sentences. holds: whether a format belongs into it.

    store: (name of the weight, weight on the CPU, dtype it had) -> tensors by their names. extras: (weights, prefix) ->
    further tensors. metadata: (weights, names of the other tensors) -> what the header says about them.
    """

    name: str
    title: str
    formats: str
    holds: Callable[[AnyFormat], bool]
    store: Callable[[str, PackedTensor, torch.dtype], Tensors]
    extras: Callable[[Mapping[str, Stored], str], Tensors] = lambda weights, prefix: {}
    metadata: Callable[[Mapping[str, Stored], list[str]], dict[str, str]] = lambda weights, plain: {}


def json_tensor(content: Mapping[str, Any]) -> torch.Tensor:
    """JSON as uint8, as bitsandbytes and ComfyUI put it into files."""
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


# bitsandbytes.functional.QuantState.as_dict(packed=True), Linear8bitLt.


def _holds_bitsandbytes(fmt: AnyFormat) -> bool:
    if isinstance(fmt, BitsAndBytes4Bit | OutlierProducts):
        return True
    return isinstance(fmt, ScaledElements) and fmt.scb


def _store_bitsandbytes(name: str, packed: PackedTensor, dtype: torch.dtype) -> Tensors:
    fmt, parts = packed.format, packed.parts
    if not isinstance(fmt, BitsAndBytes4Bit):
        layer = layer_of(name)
        layout = torch.zeros((), dtype=torch.uint8)  # row-major
        return {name: packed.data, f"{layer}.SCB": parts["scale"].view(-1), f"{layer}.weight_format": layout}
    state: dict[str, Any] = {
        "quant_type": fmt.quant_type,
        "blocksize": fmt.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    tensors = {f"{name}.{part}": parts[part] for part in fmt.part_names if part != "nested_offset"}
    if fmt.nested:
        offset = parts["nested_offset"].item()
        state |= {"nested_blocksize": fmt.nested, "nested_dtype": "float32", "nested_offset": offset}
    described = {f"{name}.quant_state.bitsandbytes__{fmt.quant_type}": json_tensor(state)}
    return {name: packed.data.view(-1, 1), **tensors, **described}


# optimum-quanto: QModuleMixin.state_dict. Groups do not tell the weight's shape; the library asks the model.

QUANTO_SHAPES = "snug_shapes"


def _holds_quanto(fmt: AnyFormat) -> bool:
    return isinstance(fmt, QuantoGroups) or is_elements(fmt, ("int8", *FLOAT8), WHOLE)


def _store_quanto(name: str, packed: PackedTensor, dtype: torch.dtype) -> Tensors:
    layer, scale = layer_of(name), packed.parts["scale"]
    ones = torch.ones((), dtype=scale.dtype)
    scales = {f"{layer}.input_scale": ones, f"{layer}.output_scale": ones.clone()}
    if isinstance(packed.format, QuantoGroups):
        data = packed.data.view(-1, packed.format.group_size)
        parts = {f"{name}._{part}": value.view(-1, 1) for part, value in packed.parts.items()}
        return {f"{name}._data._data": data, **parts, **scales}
    shape = () if scale.numel() == 1 and len(packed.data) > 1 else (-1, *[1] * (len(packed.shape) - 1))
    return {f"{name}._data": packed.data.view(packed.shape), f"{name}._scale": scale.view(shape), **scales}


def _quanto_metadata(weights: Mapping[str, Stored], plain: list[str]) -> dict[str, str]:
    kinds = {}
    for name, stored in weights.items():
        fmt = stored.format
        kind = f"qint{fmt.bits}" if isinstance(fmt, QuantoGroups) else f"q{fmt.name.partition('-')[0]}"
        kinds[layer_of(name)] = {"weights": kind, "activations": "none"}
    shapes = {name: list(s.shape) for name, s in weights.items() if isinstance(s.format, QuantoGroups)}
    return {
        "quantization_format": "quanto",
        "quantization_map": json.dumps(kinds),  # what the library keeps in quanto_qmap.json
        **({QUANTO_SHAPES: json.dumps(shapes)} if shapes else {}),
    }


# ComfyUI's first scaled FP8 (comfy.utils.convert_old_quants).


def _holds_scaled_fp8(fmt: AnyFormat) -> bool:
    return is_elements(fmt, FLOAT8, WHOLE)


def _store_scaled_fp8(name: str, packed: PackedTensor, dtype: torch.dtype) -> Tensors:
    return {name: packed.data, f"{layer_of(name)}.scale_weight": core_scale(packed)}


def _scaled_fp8_mark(weights: Mapping[str, Stored], prefix: str) -> Tensors:
    stored = next((s.format.stored for s in weights.values() if isinstance(s.format, ScaledElements)), "")
    return {f"{prefix}scaled_fp8": torch.empty(0, dtype=getattr(torch, stored))} if stored else {}


CONVENTIONS: dict[str, SafetensorsConvention] = {
    convention.name: convention
    for convention in (
        SafetensorsConvention(
            "comfy_quant",
            "ComfyUI's own convention",
            "float8 with one scale (also static and dynamic), int8 (also dynamic), int8 rotated",
            holds_core,
            store_core,
            metadata=describe_core,
        ),
        SafetensorsConvention(
            "scaled_fp8",
            "scaled FP8",
            "float8 with one scale or one for each row",
            _holds_scaled_fp8,
            _store_scaled_fp8,
            extras=_scaled_fp8_mark,
        ),
        SafetensorsConvention(
            "bitsandbytes",
            "bitsandbytes",
            "NF4, FP4 and its INT8",
            _holds_bitsandbytes,
            _store_bitsandbytes,
            metadata=describe_activations,
        ),
        SafetensorsConvention(
            "torchao",
            "torchao",
            "its int8 and float8",
            holds_torchao,
            store_torchao,
            metadata=describe_torchao,
        ),
        SafetensorsConvention(
            "quanto",
            "quanto",
            "qint8, qfloat8, qint4 and qint2",
            _holds_quanto,
            _store_quanto,
            metadata=_quanto_metadata,
        ),
        SafetensorsConvention(
            "snug",
            "Snug's own convention",
            "layers that multiply in 8 bits",
            holds_own,
            store_core,
            metadata=describe_core,
        ),
    )
}


def convention_for(tensors: Mapping[str, PackedTensor | torch.Tensor]) -> str:
    """The first convention that holds every packed weight; SnugError, naming formats, when there is none."""
    values = (tensors[name] for name in tensors)
    formats = {value.format for value in values if isinstance(value, PackedTensor)}
    formats = {fmt for fmt in formats if not (isinstance(fmt, type) and fmt.dtype is not None)}
    for name, convention in CONVENTIONS.items():
        if all(convention.holds(fmt) for fmt in formats):
            return name
    names = ", ".join(sorted(fmt.name for fmt in formats))
    raise SnugError(
        f"No convention for safetensors holds all of {names}; save as GGUF, or quantize the model to one format."
    )
