"""ComfyUI's own quantized safetensors: which of its formats a file uses, by header and descriptions alone.

Either the metadata `_quantization_metadata` = {"format_version": "1.0", "layers": {L: {"format": …}}}, or beside each
weight a tensor `L.comfy_quant`: {"format": …} as JSON in uint8 (comfy/ops.py, comfy/utils.py: convert_old_quants).
"""

from __future__ import annotations

from typing import Any

import torch

from .gguf_values import shown
from .key_groups import MAX_JSON_BYTES
from .safetensors_file import SafetensorsFile, strict_json

METADATA = "_quantization_metadata"
DESCRIPTION = ".comfy_quant"
# One line of JSON for each layer; the largest models have some thousands.
MAX_METADATA_BYTES = 1 << 24
# float8 weights with a scale beside them, which Snug can load as well.
FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2"})


def has_core_formats(file: SafetensorsFile) -> bool:
    return METADATA in file.metadata or any(name.endswith(DESCRIPTION) for name in file.tensors)


def core_formats(file: SafetensorsFile) -> frozenset[str]:
    """The names that ComfyUI gives to the file's formats; FileFormatError when they cannot be read."""
    return frozenset(_in_metadata(file) | _beside_weights(file))


def is_per_layer(file: SafetensorsFile) -> bool:
    """Whether descriptions lie beside the weights, which ComfyUI reads only since 0.4."""
    return any(name.endswith(DESCRIPTION) for name in file.tensors)


def _in_metadata(file: SafetensorsFile) -> set[str]:
    if METADATA not in file.metadata:
        return set()
    content = file.metadata[METADATA].encode("utf-8", "replace")
    if len(content) > MAX_METADATA_BYTES:
        file.fail(f"{METADATA} has {len(content)} bytes, expected at most {MAX_METADATA_BYTES}")
    found = _json(file, content, METADATA)
    layers = found.get("layers") if isinstance(found, dict) else None
    if not isinstance(layers, dict):
        file.fail(f"{METADATA} does not list layers")
    return {_format(file, layer, METADATA) for layer in layers.values()}


def _beside_weights(file: SafetensorsFile) -> set[str]:
    formats = set()
    for name, info in file.tensors.items():
        if name.endswith(DESCRIPTION):
            if info.dtype != torch.uint8 or info.nbytes > MAX_JSON_BYTES:
                file.fail(f"{shown(name)} is no text of at most {MAX_JSON_BYTES} bytes")
            content = bytes(file.read(name).view(-1).tolist())
            formats.add(_format(file, _json(file, content, shown(name)), shown(name)))
    return formats


def _json(file: SafetensorsFile, content: bytes, what: str) -> Any:
    try:
        return strict_json(content)
    except ValueError as error:
        file.fail(f"{what} is not valid JSON ({error})")


def _format(file: SafetensorsFile, description: Any, what: str) -> str:
    found = description.get("format") if isinstance(description, dict) else None
    if not isinstance(found, str) or len(found) > 64:
        file.fail(f"{what} does not name the format of a layer")
    return found
