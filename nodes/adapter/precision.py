"""Precision of a MODEL: compute dtype, float32 islands, attention, fused projections. Each clone has its own.

What core can set, it sets (compute dtype, attention). The rest is a wrapper around each call of the model: layers get
another forward when ComfyUI calls the model and lose it when the call returns, so nothing is changed for good.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ...quant_backends.formats.plain import HALVES
from .attention import COMFYUIS_CHOICE, set_attention
from .fused_projections import FusedProjections, find_projections, fused_forward
from .loading import COMPUTE_DTYPES
from .precision_islands import Island, find_islands

WRAPPER_KEY = "snug_precision"


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
    wrapper = PrecisionWrapper(settings.fp32_islands, settings.fuse_qkv)
    parts = wrapper.parts_of(clone.model)
    if chosen is not None or (parts.islands and dtype in HALVES):
        # Also lets layers cast their weights to their input: those built for one dtype do not otherwise.
        clone.set_model_compute_dtype(dtype)
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    if parts.islands or parts.projections:
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
    """Of one model."""

    islands: list[Island]
    projections: list[FusedProjections]


class PrecisionWrapper:
    """The APPLY_MODEL wrapper of one node."""

    def __init__(self, islands: bool, projections: bool) -> None:
        self._islands = islands
        self._projections = projections
        # By model, since clones can carry the wrapper to another one (a copy, another GPU).
        self._parts: weakref.WeakKeyDictionary[torch.nn.Module, _Parts] = weakref.WeakKeyDictionary()

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        others = executor.wrappers[executor.idx + 1 :]
        if others:  # innermost: what torch.compile puts in place of the layers must be there already
            model = executor.class_obj
            inner = WrapperExecutor.new_class_executor(executor.original, model, [*others, self])
            return inner.execute(*args, **kwargs)
        model = executor.class_obj
        parts = self.parts_of(model)
        islands = parts.islands if (model.manual_cast_dtype or model.get_dtype()) in HALVES else []
        with _fused(parts.projections), _raised(islands):
            return executor(*args, **kwargs)

    def parts_of(self, model: Any) -> _Parts:
        if model not in self._parts:
            network = model.diffusion_model
            islands = [Island(*found) for found in find_islands(network)] if self._islands else []
            projections = list(find_projections(network)) if self._projections else []
            self._parts[model] = _Parts(islands, projections)
        return self._parts[model]


@contextmanager
def _raised(islands: list[Island]) -> Iterator[None]:
    """Lets layers calculate in float32, around whatever their forward is at the moment."""
    replaced: list[tuple[Any, Any]] = []
    try:
        for island in islands:
            attributes = island.layer.__dict__
            if getattr(attributes.get("forward"), "__self__", None) is island:
                continue  # another thread calls this model as well
            replaced.append((attributes, attributes.get("forward")))
            island.eager = island.layer.forward
            attributes["forward"] = island.forward
        yield
    finally:
        for attributes, previous in reversed(replaced):
            if previous is None:
                del attributes["forward"]
            else:
                attributes["forward"] = previous


@contextmanager
def _fused(groups: list[FusedProjections]) -> Iterator[None]:
    """Lets groups multiply as one, except where a compiler or another node has given a layer its own forward."""
    replaced: list[Any] = []
    groups = [group for group in groups if not any("forward" in layer.__dict__ for layer in group.layers)]
    try:
        for group in groups:
            for index, layer in enumerate(group.layers):
                layer.__dict__["forward"] = fused_forward(group, index)
                replaced.append(layer)
        yield
    finally:
        for layer in replaced:
            del layer.__dict__["forward"]
        for group in groups:
            group.forget()
