"""Quantizing a MODEL or CLIP in memory: another one beside it, whose layers hold packed weights."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...quant_backends.core.errors import SnugError
from ...quant_backends.quantization import LayerInfo, Recipe, make_recipe, targets
from ...quant_backends.quantization.automatic import Mix, automatic_mix
from ...quant_backends.quantization.calibration import Calibration
from ...quant_backends.quantization.targets import product_targets
from .conversion import NETWORK, Conversion, encoding_device, layer_info, make_room, shared_weights
from .provenance import with_recipe
from .reweight import replaceable_layers, reweight, reweight_clip, unload

DEVICES = ("auto", "cpu")


@dataclass(frozen=True)
class QuantizeSettings:
    """target: a key of `targets()`. skip: as `parse_skip_patterns` takes it. calibration: of this network, or None.

    fuse_lora: whether patches are merged before quantizing, else they stay patches. requantize: whether what is
    quantized already is decoded and quantized again. device: of DEVICES; "auto" is the GPU where there is one.
    fit_gb: if not 0, the size of the result in GB: the layers that matter most then get larger formats of the target's
    family, others smaller ones.
    """

    target: str
    skip: str = "default"
    calibration: Calibration | None = None
    fuse_lora: bool = False
    requantize: bool = False
    device: str = DEVICES[0]
    fit_gb: float = 0.0


def available_targets() -> list[str]:
    """Names of the targets that can be chosen here, in the order of menus."""
    return [target.name for target in targets().values() if not target.unavailable]


def memory_targets() -> list[str]:
    """What a model in memory can be quantized to besides: layers that multiply in 8 bits."""
    return list(product_targets())


def unavailable_targets() -> dict[str, str]:
    """Those that cannot, with the reason."""
    return {target.name: target.unavailable for target in targets().values() if target.unavailable}


def quantize_model(patcher: Any, settings: QuantizeSettings) -> tuple[Any, str]:
    """(a MODEL of its own with quantized weights, report). The given one keeps every bit.

    Raises SnugError for a target that there is not or that is unavailable, a pattern that is no regular expression, and
    a calibration of another model, and for a size that cannot be reached.
    """
    quantizing = _quantizing(patcher, settings, NETWORK)
    new = _without_fused(reweight(patcher, quantizing.conversion), quantizing)
    return new, quantizing.report(patcher, new)


def quantize_clip(clip: Any, settings: QuantizeSettings) -> tuple[Any, str]:
    """The same for a CLIP, whose layers are named with their text encoder: "t5xxl.transformer.encoder.…"."""
    quantizing = _quantizing(clip.patcher, settings, "")
    new = reweight_clip(clip, quantizing.conversion)
    _without_fused(new.patcher, quantizing)
    return new, quantizing.report(clip.patcher, new.patcher)


@dataclass
class _Quantizing:
    """recipe: what becomes of layers; conversion: does it; mix: how it was chosen for a size."""

    recipe: Recipe
    conversion: Conversion
    mix: Mix | None = None

    def report(self, patcher: Any, new: Any) -> str:
        report = self.conversion.report(patcher, new)
        return f"{report}\n{self.mix.report()}" if self.mix else report


def _quantizing(patcher: Any, settings: QuantizeSettings, prefix: str) -> _Quantizing:
    model = patcher.model
    layers = [
        layer_info(name.removeprefix(prefix), layer)
        for name, layer in replaceable_layers(model)
        if name.startswith(prefix)
    ]
    importance = settings.calibration.importance if settings.calibration else {}
    if importance and not any(layer.name in importance for layer in layers):
        raise SnugError(
            "The calibration has none of this model's layers; it was recorded with another model: connect one that "
            "Calibrate (Snug) has made with this one."
        )
    recipe = make_recipe(
        settings.target,
        layers,
        [name.removeprefix(prefix) for name, _ in model.named_parameters()],
        skip=settings.skip,
        is_text_encoder=not prefix,
        importance=importance,
        statistics=settings.calibration.layers if settings.calibration else None,
    )
    device = torch.device("cpu") if settings.device == "cpu" else encoding_device(patcher)
    if device is not None:
        make_room(model, device)
    conversion = Conversion(
        f"quantized to {recipe.target.name}",
        lambda layer: keeping_reason(quantizing.recipe, layer),
        lambda layer, weight: _packed(quantizing.recipe, layer, weight),
        prefix,
        device,
        patcher.patches if settings.fuse_lora else {},
        shared_weights(model),
        settings.requantize,
    )
    quantizing = _Quantizing(recipe, conversion)
    if settings.fit_gb:
        unload(model, patcher)  # weights are looked at before they are converted
        quantizing.recipe = recipe = replace(recipe, fold=None)
        quantizing.mix = _mix(patcher, quantizing, prefix, settings)
        quantizing.recipe = replace(recipe, overrides=quantizing.mix.overrides)
    return quantizing


def _mix(patcher: Any, quantizing: _Quantizing, prefix: str, settings: QuantizeSettings) -> Mix:
    """The formats that bring a model to the size wanted; shows progress and stops when the user cancels."""
    conversion = quantizing.conversion
    layers = {
        layer_info(name.removeprefix(prefix), layer): (name, layer)
        for name, layer in replaceable_layers(patcher.model)
        if name.startswith(prefix) and conversion.converts(layer)
    }
    bar = comfy.utils.ProgressBar(max(1, len(layers)))

    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, max(1, total))

    return automatic_mix(
        quantizing.recipe,
        layers,
        lambda layer: conversion.weight(*layers[layer]),
        int(settings.fit_gb * 2**30),
        sensitivity=settings.calibration.sensitivity if settings.calibration else None,
        other_bytes=patcher.model_size() - sum(layer.weights * layer.dtype.itemsize for layer in layers),
        progress=progress,
    )


def keeping_reason(recipe: Recipe, layer: LayerInfo) -> str | None:
    """What keeps the layer as it is; None: the recipe quantizes it."""
    if recipe.format_for(layer) is not None:
        return None
    if recipe.overrides.get(layer.name) == "":
        return "the mix"
    if layer.kind not in recipe.kinds:
        return f"kind: {layer.kind}"
    return recipe.skip.reason(layer.name) or f"shape, which {recipe.target.name} cannot hold"


def _packed(recipe: Recipe, layer: LayerInfo, weight: torch.Tensor) -> Any:
    packed = recipe.quantize(layer, weight)
    assert packed is not None  # keeping_reason has been asked
    return packed


def _without_fused(new: Any, quantizing: _Quantizing) -> Any:
    """Takes the patches away that are in the weights now, and notes what was done."""
    for key in quantizing.conversion.fused:
        del new.patches[key]
    if quantizing.conversion.fused:
        new.patches_uuid = uuid.uuid4()
    done = {
        **quantizing.recipe.describe(),
        "backend": quantizing.recipe.target.backend,
        "layers": quantizing.conversion.formats.total(),
        "lora_fused_layers": len(quantizing.conversion.fused),
    }
    with_recipe(new, done)
    return new
