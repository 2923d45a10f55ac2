"""Quantizing while a file is loaded: tensor by tensor, so that a model is never whole in memory unquantized."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.model_management
import torch

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.quantization import LayerInfo, Recipe, make_recipe
from ...quant_backends.quantization.layers import EXPERTS
from .layout import DENSE, moved

AS_IN_FILE = "as in the file"

Tensors = Mapping[str, PackedTensor | torch.Tensor]
_EMBEDDING = re.compile(r"(embed_tokens|token_embedding|position_embedding|shared|word_embeddings)\.weight$")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def quantize_tensors(
    tensors: Tensors,
    target: str,
    direct: re.Pattern[str],
    progress: Callable[[float], None],
    is_text_encoder: bool = False,
) -> tuple[dict[str, PackedTensor | torch.Tensor], dict[str, Any]]:
    """(the same tensors, weights of layers quantized, what was done as `Recipe.describe` says it).

    tensors: of one network by their names in it; views of a mapped file are read one at a time and not kept.
    direct: names of weights that the model uses without one of its layers, which must stay as they are. progress:
    called with the part of the work that each layer was.
    Stops when the user cancels. Raises SnugError for an unknown target.
    """
    layers = dict(_layers(tensors, direct))
    recipe = make_recipe(target, layers.values(), tensors.keys(), is_text_encoder=is_text_encoder)
    device = _device()
    total = sum(layer.weights for layer in layers.values())
    found: dict[str, PackedTensor | torch.Tensor] = {}
    count = 0
    for name, value in tensors.items():
        layer = layers.get(name)
        packed = None if layer is None else _quantize(recipe, layer, value, device)
        found[name] = _readable(value) if packed is None else packed
        count += packed is not None
        if layer is not None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress(layer.weights / total)
    return found, {**recipe.describe(), "backend": recipe.target.backend, "layers": count}


def _layers(tensors: Tensors, direct: re.Pattern[str]) -> Iterable[tuple[str, LayerInfo]]:
    """Name of the tensor and layer of every weight that is not quantized yet."""
    for name, value in tensors.items():
        if not name.endswith(".weight") or len(value.shape) < 2 or direct.match(name):
            continue
        dtype = _plain_dtype(value)
        if dtype is not None:
            kind = "conv" if len(value.shape) > 2 else "embedding" if _EMBEDDING.search(name) else "linear"
            kind = "experts" if EXPERTS in name and len(value.shape) == 3 else kind
            yield name, LayerInfo(name.removesuffix(".weight"), tuple(value.shape), kind, dtype)


def _plain_dtype(value: PackedTensor | torch.Tensor) -> torch.dtype | None:
    """What a weight is stored in, if it is not quantized with scales or in blocks."""
    if isinstance(value, torch.Tensor):
        return value.dtype if value.dtype in (*DENSE, *_FLOAT8) else None
    dtype = value.format.dtype if isinstance(value.format, type) else None
    return dtype if dtype in DENSE else None


def _quantize(
    recipe: Recipe, layer: LayerInfo, value: PackedTensor | torch.Tensor, device: torch.device
) -> PackedTensor | None:
    if recipe.format_for(layer) is None:
        return None
    if isinstance(value, PackedTensor):
        weight = dequantize_packed(moved(value, device))
    else:
        weight = value.to(device)
        weight = weight.float() if weight.dtype in _FLOAT8 else weight
    packed = recipe.quantize(layer, weight)
    return None if packed is None else moved(packed, torch.device("cpu"))


def _readable(value: PackedTensor | torch.Tensor) -> PackedTensor | torch.Tensor:
    """Beside packed weights ComfyUI does not look for float8, in which torch calculates nothing."""
    if isinstance(value, torch.Tensor) and value.dtype in _FLOAT8:
        return value.to(torch.bfloat16)
    return value


def _device() -> torch.device:
    """A GPU encodes many times faster than a CPU; devices of other kinds may not know every number format."""
    device = comfy.model_management.get_torch_device()
    return device if device.type == "cuda" else torch.device("cpu")
