"""Precision of a MODEL: compute dtype, float32 islands, attention, fused projections. Each clone has its own.

What core can set, it sets (compute dtype, attention). The rest is a wrapper around each call of the model: layers get
another forward when ComfyUI calls the model and lose it when the call returns, so nothing is changed for good.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ...quant_backends.formats.plain import HALVES
from .attention import COMFYUIS_CHOICE, set_attention
from .fused_projections import FusedProjections, find_projections, fused_forward
from .loading import COMPUTE_DTYPES
from .precision_islands import Island, find_islands
from .temporary_attributes import Change, temporary_attributes

WRAPPER_KEY = "snug_precision"
# What lets ComfyUI's layers cast their weights to their input; the second is newer ComfyUI's, for its quantized layers.
CAST_FLAGS = ("comfy_cast_weights", "comfy_force_cast_weights")


@dataclass(frozen=True)
class PrecisionSettings:
    """compute_dtype: a key of COMPUTE_DTYPES; fp32_islands: norms and final layer in float32 while the model calculates
    in 16 bits; attention_backend, attention_slicing: as `set_attention` takes them; fuse_qkv: see fused_projections.
    """

    compute_dtype: str = "auto"
    fp32_islands: bool = True
    attention_backend: str = COMFYUIS_CHOICE
    attention_slicing: str = "off"
    fuse_qkv: bool = False


def set_precision(patcher: Any, settings: PrecisionSettings) -> tuple[Any, str]:
    """(a clone of a MODEL with these settings, report). Raises SnugError for an attention that is not here."""
    clone = patcher.clone()
    set_attention(clone, settings.attention_backend, settings.attention_slicing)
    chosen = COMPUTE_DTYPES[settings.compute_dtype]
    dtype = chosen or _compute_dtype(patcher)
    if chosen is not None:
        # Core's set_model_compute_dtype also lets layers cast for good, and then takes them for offloaded ones whose
        # LoRA it need not look at: the wrapper lets them cast instead.
        clone.add_object_patch("manual_cast_dtype", chosen)
    wrapper = PrecisionWrapper(settings, "manual_cast_dtype" in clone.object_patches)
    parts = wrapper.parts_of(clone.model)
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    if any(parts):
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, wrapper)
    return clone, _report(settings, dtype, parts)


def _compute_dtype(patcher: Any) -> torch.dtype:
    """What a MODEL calculates in now, whatever clone of it is loaded."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def _report(settings: PrecisionSettings, dtype: torch.dtype, parts: _Parts) -> str:
    islands = f"{len(parts.islands)} layers in float32" if dtype in HALVES else "float32 throughout"
    lines = [
        f"calculates in {str(dtype).removeprefix('torch.')}; {islands if parts.islands else 'no float32 islands'}",
        f"attention: {settings.attention_backend}, slicing {settings.attention_slicing}",
    ]
    if settings.fuse_qkv:
        layers = sum(len(group.layers) for group in parts.projections)
        lines.append(f"{layers} quantized projections fused to {len(parts.projections)}")
    return "\n".join(lines)


class _Parts(NamedTuple):
    """Of one model. casting: layers whose input may have another dtype than their weights."""

    islands: list[Island]
    projections: list[FusedProjections]
    casting: list[torch.nn.Module]


class PrecisionWrapper:
    """The APPLY_MODEL wrapper of one node. casts: whether the model calculates in another dtype than by itself."""

    def __init__(self, settings: PrecisionSettings, casts: bool) -> None:
        self._settings = settings
        self._casts = casts
        # By model, since clones can carry the wrapper to another one (a copy, another GPU).
        self._parts: weakref.WeakKeyDictionary[torch.nn.Module, _Parts] = weakref.WeakKeyDictionary()

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        model = executor.class_obj
        others = executor.wrappers[executor.idx + 1 :]
        if others:  # innermost: what torch.compile puts in place of the layers must be there already
            inner = WrapperExecutor.new_class_executor(executor.original, model, [*others, self])
            return inner.execute(*args, **kwargs)
        parts = self.parts_of(model)
        islands = parts.islands if (model.manual_cast_dtype or model.get_dtype()) in HALVES else []
        casting = ((layer, name, True) for layer in parts.casting for name in CAST_FLAGS)
        try:
            with (
                temporary_attributes(casting),
                temporary_attributes(_fused(parts.projections)),
                temporary_attributes(_raised(islands)),
            ):
                return executor(*args, **kwargs)
        finally:
            for group in parts.projections:
                group.forget()

    def parts_of(self, model: Any) -> _Parts:
        if model not in self._parts:
            network, settings = model.diffusion_model, self._settings
            islands = [Island(*found) for found in find_islands(network)] if settings.fp32_islands else []
            projections = list(find_projections(network)) if settings.fuse_qkv else []
            around = [network] if self._casts else [island.layer for island in islands]
            casting = [layer for part in around for layer in part.modules() if hasattr(layer, CAST_FLAGS[0])]
            self._parts[model] = _Parts(islands, projections, casting)
        return self._parts[model]


def _raised(islands: list[Island]) -> Iterator[Change]:
    """Lets layers calculate in float32, around whatever their forward is at the moment."""
    for island in islands:
        forward = island.layer.forward
        if getattr(forward, "__self__", None) is not island:  # else another thread calls this model as well
            island.eager = forward
            yield island.layer, "forward", island.forward


def _fused(groups: list[FusedProjections]) -> Iterator[Change]:
    """Lets groups multiply as one, except where a compiler or another node has given a layer its own forward."""
    for group in groups:
        if not any("forward" in layer.__dict__ for layer in group.layers):
            for index, layer in enumerate(group.layers):
                yield layer, "forward", fused_forward(group, index)
