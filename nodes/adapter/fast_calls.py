"""What fast matmul and spare memory do around each call of a MODEL: a wrapper on its patcher, with settings of its own.

Layers get their way of multiplying when ComfyUI calls the model and lose it when the call returns, so a clone without
the wrapper multiplies exactly. Copies of weights are made before the call, never in it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as management
import torch
from comfy.patcher_extension import WrappersMP

from ...quant_backends.kernels.fast_matmul import (
    fewest_tokens,
    prepare,
    round_weight,
    rounded_already,
    rounded_linear,
    rounds_in_one_pass,
)
from .layout import packed_tensor
from .operations import PackedLinear
from .spare_memory import SpareSettings, compute_dtype, fill
from .temporary_attributes import temporary_attributes
from .weight_copies import copies_of, release_copies

logger = logging.getLogger("snug")

WRAPPER_KEY = "snug_fast_calls"


@dataclass(frozen=True)
class FastCallSettings:
    """stored: how layers called `layers` (in the model) round for products, "" for none; keep: their copies in memory.

    spare: what Spare Memory Cache asks for, None without it.
    """

    stored: str = ""
    layers: frozenset[str] = frozenset()
    keep: bool = True
    spare: SpareSettings | None = None

    @property
    def copies(self) -> SpareSettings | None:
        """What is kept."""
        return self.spare or (SpareSettings(dense=False) if self.stored and self.keep else None)


def fast_call_settings(patcher: Any) -> FastCallSettings:
    found = patcher.get_wrappers(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    return found[0].settings if found else FastCallSettings()


def set_fast_calls(patcher: Any, **changes: Any) -> None:
    """Changes some of the settings of a patcher that nobody else uses yet."""
    settings = replace(fast_call_settings(patcher), **changes)
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    if settings.stored or settings.spare is not None:
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, FastCalls(settings))


def rounding_layers(model: Any, settings: FastCallSettings) -> dict[Any, str]:
    """By layer that multiplies in 8 bits, how it rounds."""
    found = (module for name, module in model.named_modules() if name in settings.layers)
    return {module: settings.stored for module in found if isinstance(module, PackedLinear)}


class Product:
    """How the linear layers of a call multiply in 8 bits; stored: as `rounded_linear` takes it."""

    def __init__(self, stored: str) -> None:
        self.stored = stored

    def __call__(
        self, layer: PackedLinear, x: torch.Tensor, weight: Any, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The layer's output, its LoRA added beside the product; None where the layer is to multiply as usual:

        for few tokens, gradients, compilers that trace, and what is added to the weight itself.
        """
        patches = layer.weight_patches
        is_merged = patches is not None and patches.branch is None
        if is_merged or layer.changed_for_a_while() or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and x.requires_grad:
            return None
        tokens, copy = x.numel() // x.shape[-1], layer.weight_copy
        packed = packed_tensor(weight)
        rounded = None if copy is None else copy.rounded
        if rounded is None or rounded.stored != self.stored:
            rounded = rounded_already(packed, self.stored)
        in_one_pass = rounded is None and rounds_in_one_pass(packed, x.device)
        if tokens < fewest_tokens(x.device, rounded is not None, in_one_pass):
            return None
        output = rounded_linear(x, rounded or round_weight(packed, self.stored, x.dtype), bias)
        return output if patches is None else patches.branch.add_to(output, x)  # type: ignore[union-attr]


class FastCalls:
    """The APPLY_MODEL wrapper of fast matmul and spare memory."""

    def __init__(self, settings: FastCallSettings) -> None:
        self.settings = settings
        self._product = Product(settings.stored)
        # By model, since clones can carry the wrapper to another one (a copy, another GPU).
        self._layers: weakref.WeakKeyDictionary[torch.nn.Module, Mapping[Any, str]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        model, settings = executor.class_obj, self.settings
        layers = self.layers_of(model)
        if layers:
            prepare(x.device, compute_dtype(model), settings.stored)
        if settings.copies is not None and isinstance(x, torch.Tensor):
            fill(model, x, layers, settings.copies)
        with temporary_attributes((layer, "product", self._product) for layer in layers):
            try:
                return executor(x, *args, **kwargs)
            except management.OOM_EXCEPTION:
                copies = copies_of(model)
                if copies is None or not copies.nbytes:
                    raise
        # Not inside the handler, whose traceback holds on to what the call had allocated.
        self._give_back(model)
        with temporary_attributes((layer, "product", self._product) for layer in layers):
            return executor(x, *args, **kwargs)

    def layers_of(self, model: Any) -> Mapping[Any, str]:
        if model not in self._layers:
            self._layers[model] = weakref.WeakKeyDictionary(rounding_layers(model, self.settings))
        return self._layers[model]

    def _give_back(self, model: Any) -> None:
        """Gives all copies back, until ComfyUI loads the model for use again."""
        copies = copies_of(model)
        state = None if copies is None else copies.state
        freed = release_copies(model)
        logger.warning("Memory ran out: %d MB of copies of weights were given back.", freed >> 20)
        management.soft_empty_cache()
        if copies is not None:
            copies.state = state
