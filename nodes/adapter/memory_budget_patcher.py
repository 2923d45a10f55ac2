"""Models that make the others leave the GPU before they are loaded, as far as a memory budget asks for it.

ComfyUI keeps models loaded as long as the card has memory for them, such as the text encoders while it samples. A
budgeted model counts them when it is loaded and has ComfyUI unload what is too much and not in use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import comfy.sampler_helpers
from comfy.patcher_extension import WrappersMP

from ...quant_backends.memory.plan import size_text

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher as _Base
else:
    _Base = object

logger = logging.getLogger("snug")

# Name of the patcher's wrapper of sampling.
_SAMPLING = "snug_memory_budget"
# Name of the patcher's attachment, which ComfyUI passes on to its clones.
_ALLOWANCE = "snug_memory_allowance"


@dataclass(frozen=True, slots=True)
class Allowance:
    """Bytes of other models' weights on the device while one model is in use: unused, of those that it does not need
    then; beside, of those that it was planned to be used with."""

    unused: int
    beside: int


class BudgetedPatcher(_Base):
    """Mixin before any kind of ModelPatcher."""

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI whenever it is about to use the model, be it loaded already or not."""
        _make_room(self, self.attachments[_ALLOWANCE])
        return super().partially_load(*args, **kwargs)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """Core's clone, and those of other packs, may fall back to a class of their own."""
        return _adopt(super().clone(*args, **kwargs))


def with_allowance(patcher: Any, allowance: Allowance) -> Any:
    """A clone that keeps to the allowance. The given patcher is not changed."""
    new = _adopt(patcher.clone())
    new.set_attachments(_ALLOWANCE, allowance)
    return new


def warn_of_more(patcher: Any, planned: int) -> None:
    """Changes the patcher: sampling that computes with more than the `planned` bytes says so in the log."""

    def prepare(
        executor: Callable[..., Any], model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        needed, _ = comfy.sampler_helpers.estimate_memory(model, noise_shape, conds)
        if needed > planned and is_on_gpu(model.load_device):
            logger.warning(
                "Sampling at this size computes with %s, where the memory budget was planned with %s: connect the "
                "latent that is sampled to Memory Budget (Snug), or raise its width, height or batch size.",
                size_text(needed),
                size_text(planned),
            )
        return executor(model, noise_shape, conds, *args, **kwargs)

    patcher.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, _SAMPLING)
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _SAMPLING, prepare)


def is_on_gpu(device: Any) -> bool:
    """Whether models are moved to the device from the host's memory."""
    return not management.is_device_cpu(device)


def _make_room(patcher: Any, allowance: Allowance) -> None:
    """ComfyUI calls this in the middle of loading a list of models, of which those that it has loaded before this one
    are marked as in use, and those that come after are not in its list."""
    device = patcher.load_device
    if not is_on_gpu(device):
        return
    others = [
        loaded
        for loaded in management.current_loaded_models
        if loaded.device == device and loaded.model is not None and not patcher.is_clone(loaded.model)
    ]
    used = [loaded for loaded in others if loaded.currently_used]
    unused_bytes = sum(loaded.model_loaded_memory() for loaded in others if not loaded.currently_used)
    used_bytes = sum(loaded.model_loaded_memory() for loaded in used)
    excess = unused_bytes + max(0, used_bytes - allowance.beside) - allowance.unused
    if excess > 0 and unused_bytes:
        management.free_memory(management.get_free_memory(device) + excess, device, keep_loaded=used)


@lru_cache
def _budgeted_class(base: type) -> type:
    return type(f"Budgeted{base.__name__}", (BudgetedPatcher, base), {})


def _adopt(patcher: Any) -> Any:
    """Exchanges the class: a second patcher on the same model would register with dynamic VRAM twice."""
    if not isinstance(patcher, BudgetedPatcher):
        patcher.__class__ = _budgeted_class(type(patcher))
    return patcher
