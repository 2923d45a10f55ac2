"""Quantized safetensors as the libraries themselves write them, and their dense twins.

Each kind is one library's own quantizer and its own naming of what it stores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers.conventions import open_quantized_safetensors
from twins import Twins

Tensors = dict[str, torch.Tensor]


def _bitsandbytes_4bit(quant_type: str, nested: bool = False) -> Callable[[str, torch.Tensor], Tensors]:
    def quantize(name: str, weight: torch.Tensor) -> Tensors:
        functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
        data, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=quant_type, compress_statistics=nested
        )
        parts = state.as_dict(packed=True)
        return {name: data} | {f"{name}.{key}": value for key, value in parts.items()}

    return quantize


def _bitsandbytes_int8(name: str, weight: torch.Tensor) -> Tensors:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    data, scales, _ = functional.int8_vectorwise_quant(weight.half())
    layer = name.removesuffix(".weight")
    return {name: data, f"{layer}.SCB": scales, f"{layer}.weight_format": torch.zeros((), dtype=torch.uint8)}


def _scaled_fp8(by_row: bool) -> Callable[[str, torch.Tensor], Tensors]:
    """There is no library for it: ComfyUI's scripts divide by the largest magnitude, as here."""

    def quantize(name: str, weight: torch.Tensor) -> Tensors:
        largest = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()
        scale = largest.float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        data = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {name: data, f"{name.removesuffix('.weight')}.scale_weight": scale}

    return quantize


def _block_fp8(name: str, weight: torch.Tensor) -> Tensors:
    """As DeepSeek's and Qwen's FP8 checkpoints: a scale for each square of 128, whose key calls it inverse.

    In small models squares of 64 where the weight is not made of larger ones.
    """
    side = 128 if all(size % 128 == 0 for size in weight.shape) else 64
    squares = weight.float().unflatten(0, (-1, side)).unflatten(2, (-1, side))
    scale = squares.abs().amax((1, 3)).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    data = (squares / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return {name: data.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def _quanto(kind: str) -> Callable[[str, torch.Tensor], Tensors]:
    def quantize(name: str, weight: torch.Tensor) -> Tensors:
        quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        layer = _layer(weight)
        quanto.quantize(layer, weights=quanto.qtypes[kind])
        quanto.freeze(layer)
        state = layer.state_dict()
        return {
            name.removesuffix("weight") + key.removeprefix("0."): value
            for key, value in state.items()
            if value.numel()
        }

    return quantize


def _layer(weight: torch.Tensor) -> torch.nn.Sequential:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return torch.nn.Sequential(layer)


_BY_TENSOR: dict[str, Callable[[str, torch.Tensor], Tensors]] = {
    "nf4": _bitsandbytes_4bit("nf4"),
    "nf4-nested": _bitsandbytes_4bit("nf4", nested=True),
    "fp4": _bitsandbytes_4bit("fp4"),
    "int8": _bitsandbytes_int8,
    "fp8": _scaled_fp8(by_row=False),
    "fp8-rows": _scaled_fp8(by_row=True),
    "fp8-blocks": _block_fp8,
    "quanto-int8": _quanto("qint8"),
    "quanto-float8": _quanto("qfloat8"),
    "quanto-int4": _quanto("qint4"),
}
_TORCHAO = {"torchao-int8": "Int8WeightOnlyConfig", "torchao-float8": "Float8WeightOnlyConfig"}
KINDS = (*_BY_TENSOR, *_TORCHAO)


def quantize_tensors(tensors: Mapping[str, torch.Tensor], kind: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors as the library of `kind` stores them, and the metadata of the file.

    Matrices named "….weight" with at least 4096 elements, whole groups of 64, are quantized; the rest stays (with
    quanto's qint4 also those without a bias, which alone tells the shape; with blocks what is not made of them).
    """
    allowed = {
        "quanto-int4": lambda name: name.removesuffix("weight") + "bias" in tensors,
        "fp8-blocks": lambda name: all(size % 64 == 0 for size in tensors[name].shape),
    }.get(kind, bool)
    weights = {
        name: value for name, value in tensors.items() if _is_quantizable(name, value) and allowed(name)
    }
    rest = {name: value for name, value in tensors.items() if name not in weights}
    if kind in _TORCHAO:
        return _torchao(weights, rest, _TORCHAO[kind])
    for name, value in weights.items():
        rest.update(_BY_TENSOR[kind](name, value))
    if kind in ("fp8", "fp8-rows"):
        rest["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return rest, {"quantization_format": "quanto"} if kind.startswith("quanto") else {}


def _is_quantizable(name: str, value: torch.Tensor) -> bool:
    return (
        name.endswith(".weight") and value.dim() == 2 and value.numel() >= 4096 and value.shape[1] % 64 == 0
    )


def _torchao(weights: Tensors, rest: Tensors, config: str) -> tuple[Tensors, dict[str, str]]:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    state: dict[str, Any] = dict(rest)
    for name, value in weights.items():
        layer = _layer(value)
        torchao.quantize_(layer, getattr(torchao, config)(set_inductor_config=False))
        state[name] = layer.state_dict()["0.weight"]
    return support.flatten_tensor_state_dict(state)


def dense_tensors(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Tensors:
    """Every weight of a quantized safetensors file, decoded to float32 (tests of the readers compare these with
    the libraries' own results)."""
    found = open_quantized_safetensors(path, shapes).state_dict
    return {
        name: dequantize_packed(value) if isinstance(value, PackedTensor) else value.float().clone()
        for name, value in found.items()
    }


def quantized_twins(source: Path, folder: Path, kind: str) -> Twins:
    """Writes the dense safetensors file `source` to `folder` as `kind`, and its float32 twin beside it."""
    from safetensors.torch import load_file

    path, twin = (
        folder / f"{source.stem}-{kind}.safetensors",
        folder / f"{source.stem}-{kind}-dense.safetensors",
    )
    tensors, metadata = quantize_tensors(load_file(source), kind)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    save_file(dense_tensors(path), twin)
    packed = [v for v in open_quantized_safetensors(path).state_dict.values() if isinstance(v, PackedTensor)]
    return Twins(path, twin, sum(v.nbytes for v in packed), sum(torch.Size(v.shape).numel() for v in packed))
