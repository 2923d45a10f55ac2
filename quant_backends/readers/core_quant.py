"""ComfyUI's own quantized safetensors: what they say about each layer, by header and descriptions alone.

Either the metadata `_quantization_metadata` = {"format_version": "1.0", "layers": {L: {"format": …}}}, or beside each
weight a tensor `L.comfy_quant`: {"format": …} as JSON in uint8 (comfy/ops.py, comfy/utils.py: convert_old_quants).
int8_tensorwise also has "convrot" and "convrot_groupsize", there or in "params".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch

from .activation_keys import FORMAT as OWN_INT8
from .gguf_values import shown
from .key_groups import MAX_JSON_BYTES, KeyGroups
from .safetensors_file import SafetensorsFile, are_counts, strict_json

METADATA = "_quantization_metadata"
DESCRIPTION = ".comfy_quant"
# One line of JSON for each layer; the largest models have some thousands.
MAX_METADATA_BYTES = 1 << 24
INT8 = "int8_tensorwise"
# int8 or float8 weights with a scale beside them, which Snug can load as well, and its own.
LOADABLE = frozenset({"float8_e4m3fn", "float8_e5m2", INT8, OWN_INT8})
SCALE = ".weight_scale"


def has_core_formats(file: SafetensorsFile) -> bool:
    return METADATA in file.metadata or any(name.endswith(DESCRIPTION) for name in file.tensors)


def core_formats(file: SafetensorsFile) -> frozenset[str]:
    """The names that ComfyUI gives to the file's formats; FileFormatError when they cannot be read."""
    return frozenset(layer["format"] for layer in core_layers(file).values())


def is_per_layer(file: SafetensorsFile) -> bool:
    """Whether descriptions lie beside the weights, which ComfyUI reads only since 0.4."""
    return any(name.endswith(DESCRIPTION) for name in file.tensors)


def core_layers(file: SafetensorsFile) -> dict[str, Mapping[str, Any]]:
    """What the file says about each quantized layer, "format" always among it; what lies beside a weight wins."""
    return _in_metadata(file) | _beside_weights(file)


def only_layers(file: SafetensorsFile, names: Collection[str]) -> SafetensorsFile:
    """The file as if it had only these tensors, and said nothing about other layers."""
    metadata = dict(file.metadata)
    layers = {name: layer for name, layer in _in_metadata(file).items() if f"{name}.weight" in names}
    if METADATA in metadata and not layers:
        del metadata[METADATA]
    elif layers:
        metadata[METADATA] = json.dumps({"layers": layers})
    return file.only(names, metadata)


def load_core_int8(groups: KeyGroups) -> None:
    """Puts the int8 layers of an open file together; scales of a layer that is none are left where they are."""
    layers = core_layers(groups.file)
    groups.keep([name for name in groups.file.tensors if name.endswith(DESCRIPTION)])
    for layer, description in layers.items():
        name = f"{layer}.weight"
        if description["format"] != INT8 or name not in groups.left:
            continue
        weight, scale = groups.take(name), groups.take(layer + SCALE)
        if weight.dtype != torch.int8 or not weight.dim():
            groups.file.fail(f"the weight {shown(name)} is {weight.dtype}, expected int8")
        kind = "tensor" if scale.numel() == 1 else "rows"
        group = rotated_group(groups.file, name, description)
        if group:
            kind = f"rows-rotated-{group}"
        groups.pack(name, weight, f"int8-{kind}", tuple(weight.shape), {"scale": scale})


def rotated_group(file: SafetensorsFile, name: str, description: Mapping[str, Any]) -> int:
    """How many channels were rotated together; 0: none."""
    nested = description.get("params")
    options = {**(nested if isinstance(nested, dict) else {}), **description}
    size = options.get("convrot_groupsize", 256)
    if not options.get("convrot", False):
        return 0
    if not are_counts([size]) or not 4 <= size <= 1 << 20:
        file.fail(f"the description of {shown(name)} has no possible convrot_groupsize")
    return size


def _in_metadata(file: SafetensorsFile) -> dict[str, Mapping[str, Any]]:
    if METADATA not in file.metadata:
        return {}
    content = file.metadata[METADATA].encode("utf-8", "replace")
    if len(content) > MAX_METADATA_BYTES:
        file.fail(f"{METADATA} has {len(content)} bytes, expected at most {MAX_METADATA_BYTES}")
    found = _json(file, content, METADATA)
    layers = found.get("layers") if isinstance(found, dict) else None
    if not isinstance(layers, dict):
        file.fail(f"{METADATA} does not list layers")
    return {name: _description(file, layer, METADATA) for name, layer in layers.items()}


def _beside_weights(file: SafetensorsFile) -> dict[str, Mapping[str, Any]]:
    layers = {}
    for name, info in file.tensors.items():
        if name.endswith(DESCRIPTION):
            if info.dtype != torch.uint8 or info.nbytes > MAX_JSON_BYTES:
                file.fail(f"{shown(name)} is no text of at most {MAX_JSON_BYTES} bytes")
            content = bytes(file.read(name).view(-1).tolist())
            described = _json(file, content, shown(name))
            layers[name.removesuffix(DESCRIPTION)] = _description(file, described, shown(name))
    return layers


def _json(file: SafetensorsFile, content: bytes, what: str) -> Any:
    try:
        return strict_json(content)
    except ValueError as error:
        file.fail(f"{what} is not valid JSON ({error})")


def _description(file: SafetensorsFile, description: Any, what: str) -> Mapping[str, Any]:
    found = description.get("format") if isinstance(description, dict) else None
    if not isinstance(found, str) or len(found) > 64:
        file.fail(f"{what} does not name the format of a layer")
    return description
