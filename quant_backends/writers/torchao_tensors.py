"""torchao's safetensors form, as torchao.prototype.safetensors' flatten_tensor_state_dict makes it (torchao 0.18)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..core.packed import PackedTensor
from ..formats import Format
from ..formats.scaled import ScaledElements, ScaledFormat
from ..formats.scaled_base import rows_and_columns
from .stored import Stored

_STORED = ("int8", "float8_e4m3fn", "float8_e5m2")


def holds_torchao(fmt: type[Format] | ScaledFormat) -> bool:
    return isinstance(fmt, ScaledElements) and fmt.stored in _STORED and not fmt.scb


def store_torchao(name: str, packed: PackedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`L._weight_qdata`, `L._weight_scale` and, where there is one, `L._weight_zero_point`."""
    module, _, parameter = name.rpartition(".")
    prefix = f"{module}._{parameter}_" if module else f"_{parameter}_"
    rows, columns = rows_and_columns(packed.shape)
    block = _block(packed.format, packed.shape)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    tensors = {
        f"{prefix}qdata": packed.data.view(rows, columns),
        f"{prefix}scale": packed.parts["scale"].view(grid),
    }
    if "zero" in packed.parts:
        tensors[f"{prefix}zero_point"] = packed.parts["zero"].view(grid)
    return tensors


def describe_torchao(weights: Mapping[str, Stored], plain: list[str]) -> dict[str, str]:
    """The metadata; torchao asks for a description of plain tensors as well, and for names with a dot."""
    described = {name: json.dumps({"_type": "Tensor"}) for name in plain if "." in name}
    described |= {name: json.dumps(_description(stored)) for name, stored in weights.items()}
    return {**described, "tensor_names": json.dumps([*weights, *(name for name in plain if "." in name)])}


def _description(stored: Stored) -> dict[str, Any]:
    fmt = stored.format
    assert isinstance(fmt, ScaledElements)
    block = _block(fmt, stored.shape)
    dtype = _torch_dtype(stored.dtype)
    if fmt.stored != "int8":
        options = {"block_size": block, "mm_config": None, "act_quant_kwargs": None}
        options |= {"kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}, "dtype": dtype}
        return {"_type": "Float8Tensor", "_data": options, "_tensor_data_names": ["qdata", "scale"]}
    if stored.is_symmetric and stored.scale_dtype == torch.float32:
        options = {"act_quant_kwargs": None, "reduce_range": False, "block_size": block, "dtype": dtype}
        names = ["zero_point", "qdata", "scale"] if fmt.zero else ["qdata", "scale"]
        return {"_type": "Int8Tensor", "_data": options, "_tensor_data_names": names}
    options = {"target_dtype": _torch_dtype(torch.int8), "block_size": block, "dtype": dtype}
    return {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {**options, "activation_quantization": None},
        "_tensor_data_names": ["qdata", "scale", "zero_point"] if fmt.zero else ["qdata", "scale"],
    }


def _torch_dtype(dtype: torch.dtype) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


def _block(fmt: object, shape: tuple[int, ...]) -> list[int]:
    """torchao's block_size: rows and columns that share a scale."""
    assert isinstance(fmt, ScaledElements)
    return [block or size for block, size in zip(fmt.block, rows_and_columns(shape), strict=True)]
