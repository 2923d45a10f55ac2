"""Differences between ComfyUI versions, found by looking at what is there rather than at version numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import comfy.ldm.flux.layers
import comfy.ops


def supported_arguments(function: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
    """Those of the `wanted` keyword arguments that this ComfyUI's `function` knows."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in wanted.items() if name in known}


@lru_cache
def flux_qk_norm() -> Literal["scale", "weight"]:
    """What the query and key norms of Flux blocks call their parameter."""
    norm = comfy.ldm.flux.layers.QKNorm(1, operations=comfy.ops.manual_cast)
    return "weight" if "query_norm.weight" in norm.state_dict() else "scale"
