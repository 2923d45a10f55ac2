"""Quantized weights of safetensors files by names, dtypes and shapes alone: which tensors form one weight.

The conventions are those of `readers`, which put the tensors themselves together and check what they say; here nothing
is read, so that what only a tensor's content tells (shapes of bitsandbytes' 4-bit weights) is found out from others or
left open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..readers.activation_keys import OWN_PART, activations, format_with, has_activations
from ..readers.bitsandbytes_keys import QUANT_STATES
from ..readers.core_quant import DESCRIPTION, METADATA, rotated_group
from ..readers.fp8_keys import MARKER
from ..readers.quanto_keys import DATA, PACKED
from ..readers.safetensors_file import SafetensorsFile, StoredTensor, strict_json
from .stored import StoredWeight, plain

CODES = "codes"
# What stands beside a weight "X", by the end of its name.
_BESIDE_WEIGHT = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    *QUANT_STATES.values(),
    "._scale",
    "._shift",
)
# What stands beside a layer "L" whose weight is "L.weight".
_BESIDE_LAYER = (
    ".SCB",
    ".weight_format",
    ".scale_weight",
    ".scale_input",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_scale_inv",
    ".input_scale",
    ".output_scale",
    ".activation_scale",
    *(OWN_PART + part for part in ("scale", "factor", "step", "shift", "offset")),
    DESCRIPTION,
)
_TORCHAO = ("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point")
# Those of them that are no part of a weight in memory: descriptions, and scales of activations.
_NO_WEIGHT = (
    *QUANT_STATES.values(),
    ".weight_format",
    ".scale_input",
    ".input_scale",
    ".output_scale",
    ".activation_scale",
    "act_quant_scale",
    "act_quant_zero_point",
    DESCRIPTION,
)
# ComfyUI's formats with two weights in a byte.
_TWO_IN_A_BYTE = ("nvfp4", "mxfp4")

Parts = dict[str, StoredTensor]


def stored_weights(file: SafetensorsFile) -> list[StoredWeight]:
    """The weights of a file, in the order of its header; scales and the like count to theirs."""
    groups: dict[str, Parts] = {}
    for name, info in file.tensors.items():
        if name != MARKER and not name.endswith("." + MARKER):
            owner, role = _owner(name, file.tensors)
            groups.setdefault(owner, {})[role] = info
    described, own = _core_layers(file), has_activations(file)
    formats = {} if own else {name: str(layer["format"]) for name, layer in described.items()}
    biases = {name: info.shape for name, info in file.tensors.items() if name.endswith("bias")}
    found = (_weight(name, parts, biases, formats) for name, parts in groups.items())
    return [*_with_own_names(file, found, groups, described)] if own else [*found]


def _with_own_names(
    file: SafetensorsFile,
    weights: Iterable[StoredWeight],
    groups: Mapping[str, Parts],
    described: Mapping[str, Mapping[str, Any]],
) -> Iterator[StoredWeight]:
    """The same weights; the formats are those that the file's descriptions of layers make them."""
    kinds = activations(file)
    for weight in weights:
        layer, codes = weight.name.removesuffix(".weight"), groups[weight.name].get(CODES)
        name = weight.format
        if layer in kinds and codes is not None:
            fmt = format_with(str(codes.dtype).removeprefix("torch."), kinds[layer])
            name = name if fmt is None else fmt.name
        elif layer in described and (size := rotated_group(file, weight.name, described[layer])):
            name = f"int8-rows-rotated-{size}"
        yield weight if name == weight.format else replace(weight, format=name)


def _owner(name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, str]:
    """(the weight that a tensor belongs to, what it is of it)"""
    for end in (PACKED, DATA):
        if name.endswith(end) and name.removesuffix(end) + "._scale" in tensors:
            return name.removesuffix(end), CODES
    for end in _BESIDE_WEIGHT:
        owner = name.removesuffix(end)
        if owner != name and (owner in tensors or owner + DATA in tensors or owner + PACKED in tensors):
            return owner, end
    for end in _BESIDE_LAYER:
        owner = name.removesuffix(end) + ".weight"
        if name.endswith(end) and (owner in tensors or owner + DATA in tensors or owner + PACKED in tensors):
            return owner, end
    module, _, last = name.rpartition(".")
    prefix, _, role = last.partition("weight_")
    if prefix == "_" and role in _TORCHAO and f"{module}._weight_qdata".lstrip(".") in tensors:
        return f"{module}.weight".lstrip("."), CODES if role == "qdata" else role
    return name, CODES


def _weight(
    name: str, parts: Parts, biases: Mapping[str, tuple[int, ...]], formats: Mapping[str, str]
) -> StoredWeight:
    codes = parts.get(CODES)
    if codes is None:  # scales of a weight that is missing
        codes = next(iter(parts.values()))
        return plain(name, codes.dtype, codes.shape)
    nbytes = sum(part.nbytes for role, part in parts.items() if role not in _NO_WEIGHT)
    format, shape, weights = _form(name, codes, parts, biases, formats)
    if format is None:
        return plain(name, codes.dtype, codes.shape)
    return StoredWeight(name, format, shape, weights, nbytes)


def _form(
    name: str,
    codes: StoredTensor,
    parts: Parts,
    biases: Mapping[str, tuple[int, ...]],
    formats: Mapping[str, str],
) -> tuple[str | None, tuple[int, ...] | None, int]:
    """(format, or None for a plain tensor; logical shape, None where it is not known; number of weights)"""
    count = math.prod(codes.shape)
    stored = str(codes.dtype).removeprefix("torch.")
    layer = name.removesuffix(".weight")
    for kind, end in QUANT_STATES.items():
        if end in parts:
            return _four_bit(kind, parts, 2 * count), _by_bias(name, 2 * count, biases), 2 * count
    if ".SCB" in parts:
        return "int8-rows-scb", codes.shape, count
    if layer in formats or DESCRIPTION in parts:
        named = formats.get(layer) or ("nvfp4" if ".weight_scale_2" in parts else stored)
        weights = 2 * count if named in _TWO_IN_A_BYTE else count
        shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if weights > count and codes.shape else codes.shape
        return f"{named} (ComfyUI)", shape, weights
    if "._shift" in parts and "._scale" in parts and codes.shape:
        groups = math.prod(parts["._scale"].shape)
        bits = 2 if groups and 4 * codes.shape[0] < 2 * groups else 4
        weights = groups * codes.shape[-1]
        return f"quanto-int{bits}-{codes.shape[-1]}", _by_bias(name, weights, biases), weights
    for role in (
        "._scale",
        "scale",
        ".scale_weight",
        ".weight_scale",
        ".weight_scale_inv",
        f"{OWN_PART}scale",
    ):
        if role in parts and (codes.dtype.itemsize == 1):
            zero = "-zero" if "zero_point" in parts else ""
            return f"{stored}-{_scaled_by(codes.shape, parts[role].shape)}{zero}", codes.shape, count
    return None, codes.shape, count


def _four_bit(kind: str, parts: Parts, weights: int) -> str:
    blocks = math.prod(parts[".absmax"].shape) if ".absmax" in parts else 0
    nested = math.prod(parts[".nested_absmax"].shape) if ".nested_absmax" in parts else 0
    name = f"bnb-{kind}-{_power_of_two(weights, blocks)}"
    return f"{name}-nested-{_power_of_two(blocks, nested)}" if nested else name


def _power_of_two(items: int, blocks: int) -> int:
    """The block size of so many blocks, of which the last may be cut."""
    size = -(-items // blocks) if blocks else 1
    return 1 << (size - 1).bit_length() if size else 1


def _scaled_by(shape: tuple[int, ...], scales: tuple[int, ...]) -> str:
    """What shares a scale, as names of formats say it."""
    count = math.prod(scales)
    if count <= 1:
        return "tensor"
    if len(shape) != 2 or len(scales) != 2 or scales == (shape[0], 1):
        return "rows"
    return "x".join(str(_power_of_two(size, blocks)) for size, blocks in zip(shape, scales, strict=True))


def _by_bias(name: str, weights: int, biases: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    rows = math.prod(biases.get(name.removesuffix("weight") + "bias", ()) or (0,))
    return (rows, weights // rows) if rows and weights % rows == 0 else None


def _core_layers(file: SafetensorsFile) -> dict[str, Mapping[str, Any]]:
    """Layer to ComfyUI's description of it, which names a format, where the metadata lists them."""
    if METADATA not in file.metadata:
        return {}
    try:
        found = strict_json(file.metadata[METADATA].encode("utf-8", "replace"))
    except ValueError as error:
        file.fail(f"{METADATA} is not valid JSON ({error})")
    layers = found.get("layers") if isinstance(found, dict) else None
    if not isinstance(layers, dict):
        file.fail(f"{METADATA} does not list layers")
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, dict) and isinstance(layer.get("format"), str)
    }
