"""bitsandbytes' 4-bit and INT8 weights by their keys.

4-bit: `X`, `X.absmax`, `X.quant_map`, [`X.nested_absmax`, `X.nested_quant_map`,] `X.quant_state.bitsandbytes__nf4`
or `__fp4`: JSON as uint8 with quant_type, blocksize, dtype, shape[, nested_blocksize, nested_dtype, nested_offset].
INT8: `L.weight` int8, `L.SCB` float32 [rows][, `L.weight_format` uint8, 0 for row-major].
"""

from __future__ import annotations

import torch

from .gguf_tensors import is_possible
from .gguf_values import shown
from .key_groups import MAX_JSON_BYTES, KeyGroups
from .safetensors_file import SafetensorsFile, are_counts

QUANT_STATES = {kind: f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
SCALES = ".SCB"


def has_4bit(file: SafetensorsFile) -> bool:
    return any(name.endswith(tuple(QUANT_STATES.values())) for name in file.tensors)


def has_int8(file: SafetensorsFile) -> bool:
    return any(name.endswith(SCALES) for name in file.tensors)


def load_4bit(groups: KeyGroups) -> None:
    for kind, suffix in QUANT_STATES.items():
        for name in groups.ending(suffix):
            _load_4bit(groups, name, kind, groups.take(name + suffix))


def _load_4bit(groups: KeyGroups, name: str, kind: str, stored: torch.Tensor) -> None:
    what = f"the quantization state of {shown(name)}"
    if stored.dtype != torch.uint8 or stored.numel() > MAX_JSON_BYTES:
        groups.file.fail(f"{what} is no text of at most {MAX_JSON_BYTES} bytes")
    state = groups.json(bytes(stored.view(-1).tolist()), what)
    shape, block, nested = state.get("shape"), state.get("blocksize"), state.get("nested_blocksize", 0)
    if state.get("quant_type") != kind:
        groups.file.fail(f"{what} names another type than its key, {kind}")
    if not isinstance(shape, list) or not are_counts(shape) or len(shape) > 8 or not is_possible(shape):
        groups.file.fail(f"{what} has no possible shape")
    if not are_counts([block, nested]):
        groups.file.fail(f"{what} has no possible block sizes")
    parts = {"absmax": groups.take(f"{name}.absmax"), "quant_map": groups.take(f"{name}.quant_map")}
    format_name = f"bnb-{kind}-{block}"
    if nested:
        format_name += f"-nested-{nested}"
        parts["nested_absmax"] = groups.take(f"{name}.nested_absmax")
        parts["nested_quant_map"] = groups.take(f"{name}.nested_quant_map")
        offset = state.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or abs(offset) > 3e38:
            groups.file.fail(f"{what} has no nested_offset")
        parts["nested_offset"] = torch.tensor([float(offset)])
    groups.pack(name, groups.take(name), format_name, tuple(shape), parts)


def load_int8(groups: KeyGroups) -> None:
    for layer in groups.ending(SCALES):
        layout = f"{layer}.weight_format"
        if layout in groups.left and groups.take(layout).view(-1).view(torch.uint8).any():
            groups.file.fail(
                f"{shown(layer)} is stored in a GPU's own tile order of an old bitsandbytes",
                "save the model again with a current bitsandbytes, which stores rows",
            )
        name = f"{layer}.weight"
        weight = groups.take(name)
        groups.pack(
            name, weight, "int8-rows-scb", tuple(weight.shape), {"scale": groups.take(layer + SCALES)}
        )
