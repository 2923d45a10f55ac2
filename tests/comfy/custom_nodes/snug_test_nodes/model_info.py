"""Reports how a loaded model is held, for checks of memory accounting."""

from __future__ import annotations

import json
from typing import Any

import torch


class SnugTestModelInfo:
    """MODEL to one JSON text in the history (`outputs[id]["model_info"][0]`).

    parameters: per "type:dtype" or, where a tensor names its layout, "type:layout", the count and the bytes
    of the denoiser's parameters and buffers; model_size, loaded_size: bytes, as the patcher counts them;
    is_dynamic: null where ComfyUI has no dynamic loading; dtype, manual_cast_dtype: compute types.
    Connect `samples` to look at the model after sampling.
    """

    RETURN_TYPES = ()
    FUNCTION = "describe"
    CATEGORY = "snug/tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}, "optional": {"samples": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")  # the same model may have been moved since: never cached

    def describe(self, model: Any, samples: Any = None) -> dict[str, Any]:
        is_dynamic = getattr(model, "is_dynamic", None)
        info = {
            "parameters": count_tensors(model.model.diffusion_model),
            "model_size": model.model_size(),
            "loaded_size": model.loaded_size(),
            "is_dynamic": is_dynamic() if is_dynamic is not None else None,
            "patches": len(model.patches),
            "dtype": str(model.model_dtype()),
            "manual_cast_dtype": str(model.model.manual_cast_dtype),
            "load_device": str(model.load_device),
        }
        return {"ui": {"model_info": [json.dumps(info)]}}


def count_tensors(module: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Count, weights and bytes of the module's parameters and buffers per kind of tensor."""
    kinds: dict[str, dict[str, int]] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        totals = kinds.setdefault(_kind(tensor), {"count": 0, "weights": 0, "bytes": 0})
        totals["count"] += 1
        totals["weights"] += tensor.numel()
        totals["bytes"] += _nbytes(tensor)
    return kinds


def _nbytes(tensor: torch.Tensor) -> int:
    """Of a quantized tensor its codes and whatever lies beside them."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    inner, _ = flatten()
    return sum(getattr(tensor, name).nbytes for name in inner)


def _kind(tensor: torch.Tensor) -> str:
    # comfy-kitchen's attribute, then that of the QuantizedTensor in ComfyUI 0.3.75.
    layout = getattr(tensor, "_layout_cls", getattr(tensor, "_layout_type", None))
    name = "Tensor" if type(tensor) in (torch.Tensor, torch.nn.Parameter) else type(tensor).__name__
    return f"{name}:{getattr(layout, '__name__', layout) if layout is not None else tensor.dtype}"
