"""torchao's safetensors form (torchao.prototype.safetensors.safetensors_support.flatten_tensor_state_dict).

Metadata: `tensor_names`, a JSON list; for each name `L.weight` JSON {"_type", "_data", "_tensor_data_names"}. The
tensors are called `L._weight_qdata`, `L._weight_scale`, `L._weight_zero_point`; plain ones keep their name.
diffusers writes the same.
"""

from __future__ import annotations

import torch

from .gguf_values import shown
from .key_groups import KeyGroups
from .safetensors_file import SafetensorsFile, are_counts, strict_json

NAMES = "tensor_names"
STORED = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
ELEMENTWISE = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
# Scales of activations: they are not part of the weight, and multiplying without them is exact.
ACTIVATIONS = ("act_quant_scale", "act_quant_zero_point")


def has_torchao(file: SafetensorsFile) -> bool:
    return NAMES in file.metadata


def load_torchao(groups: KeyGroups) -> None:
    try:
        names = strict_json(groups.file.metadata[NAMES].encode("utf-8", "replace"))
    except ValueError as error:
        groups.file.fail(f"torchao's list of tensor names is not valid JSON ({error})")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        groups.file.fail("torchao's list of tensor names is not a list of names")
    for name in names:
        what = f"torchao's description of {shown(name)}"
        description = groups.json(groups.file.metadata.get(name, "").encode("utf-8", "replace"), what)
        if description.get("_type") != "Tensor":
            _load(groups, name, description)


def _load(groups: KeyGroups, name: str, description: dict) -> None:
    kind, options = description.get("_type"), description.get("_data")
    if kind not in ELEMENTWISE:
        groups.file.fail(
            f"{shown(name)} is torchao's {shown(str(kind))}, a layout made for one kind of GPU or kernel",
            "quantize the model to torchao int8 or float8, or load an NF4 or GGUF version of it",
        )
    module, _, parameter = name.rpartition(".")
    prefix = f"{module}._{parameter}_" if module else f"_{parameter}_"
    if prefix + "act_pre_scale" in groups.left:
        groups.file.fail(
            f"{shown(name)} scales its inputs (act_pre_scale), which Snug does not do",
            "quantize the model without SmoothQuant or AWQ",
        )
    data, scale = groups.take(prefix + "qdata"), groups.take(prefix + "scale")
    groups.keep(prefix + suffix for suffix in ACTIVATIONS)
    if data.dtype not in STORED or data.dim() != 2 or not data.numel():
        groups.file.fail(f"the codes of {shown(name)} are {data.dtype} in {data.dim()} dimensions")
    block = options.get("block_size") if isinstance(options, dict) else None
    if not isinstance(block, list) or not are_counts(block) or len(block) != 2 or 0 in block:
        groups.file.fail(f"torchao's description of {shown(name)} has no possible block_size")
    rows, columns = (min(size, most) for size, most in zip(block, data.shape, strict=True))
    whole = "tensor" if (rows, columns) == tuple(data.shape) else "rows"
    fits = whole == "tensor" or (rows == 1 and columns == data.shape[1])
    parts = {"scale": scale}
    if prefix + "zero_point" in groups.left:
        parts["zero"] = groups.take(prefix + "zero_point")
    format_name = (
        f"{STORED[data.dtype]}-{whole if fits else f'{rows}x{columns}'}{'-zero' if len(parts) > 1 else ''}"
    )
    groups.pack(name, data, format_name, tuple(data.shape), parts)
