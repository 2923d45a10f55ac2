"""Differences between ComfyUI versions, found by looking at what is there rather than at version numbers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import comfy.ldm.flux.layers
import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch

logger = logging.getLogger("snug")


def supported_arguments(function: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
    """Those of the `wanted` keyword arguments that this ComfyUI's `function` knows."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in wanted.items() if name in known}


def is_dynamic(patcher: Any) -> bool:
    """Whether ComfyUI pages this model's weights (dynamic VRAM); older versions cannot."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def is_low_vram_patch(function: Any) -> bool:
    """Whether core attached this weight function to merge a LoRA into an offloaded weight."""
    return getattr(function, "is_lowvram_patch", type(function).__name__ == "LowVramPatch")


def core_quantization(per_layer: bool) -> frozenset[str]:
    """The quantized formats that this ComfyUI itself loads.

    per_layer: described beside each weight rather than in the file's metadata, which 0.3.75 does not read.
    """
    if per_layer and not hasattr(comfy.utils, "convert_old_quants"):
        return frozenset()
    return frozenset(comfy.quant_ops.QUANT_ALGOS)


@lru_cache
def flux_qk_norm() -> Literal["scale", "weight"] | None:
    """What the query and key norms of Flux blocks call their parameter; None when that cannot be found out."""
    try:
        norm = comfy.ldm.flux.layers.QKNorm(1, operations=comfy.ops.manual_cast)
    except TypeError as error:
        logger.warning(
            "This ComfyUI builds Flux's norms in a new way (%s); names are kept as in files.", error
        )
        return None
    return "weight" if "query_norm.weight" in norm.state_dict() else "scale"


class _OneByte:
    """A value for a state dict that says how its size is read."""

    nbytes = 1

    def nelement(self) -> int:
        return 2

    def element_size(self) -> int:
        return 2


class _Sized(torch.nn.Module):
    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"value": _OneByte()}


@lru_cache
def sizes_are_read_from_nbytes() -> bool:
    """Whether core sums `nbytes` to get a model's size; 0.3.75 multiplies elements by their size."""
    return comfy.model_management.module_size(_Sized()) == 1
