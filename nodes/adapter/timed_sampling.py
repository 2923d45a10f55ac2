"""One run of the sampler with the times of its parts, on a device that is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from .sampling import Sampling, sample

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError  # what torch raises for every kind of GPU
_KEY = "snug_timed_sampling"


@dataclass(slots=True)
class Timing:
    """In seconds. loading: until ComfyUI had the model where it samples, and all that the prompts need besides.
    steps: from one step's end to the next one's, the first from the end of loading. total: of the whole run."""

    loading: float = 0.0
    steps: list[float] = field(default_factory=list)
    total: float = 0.0


def sample_timed(
    patcher: Any,
    prompts: tuple[Any, Any],
    latent: dict[str, Any],
    sampling: Sampling,
    on_loaded: Callable[[], None],
    on_step: Callable[[], None],
) -> tuple[torch.Tensor, Timing]:
    """(latent, times). prompts: positive and negative CONDITIONING. on_loaded, on_step: called when the model is there
    and after each step; what they take is not counted. Stops when the user cancels.

    At the end of a step the device is waited for, or its time would be that of handing work over.
    """
    clone, timing = patcher.clone(), Timing()
    device = patcher.load_device
    started = moment = time.perf_counter()

    def take(callback: Callable[[], None]) -> float:
        """Seconds since the moment before; the next ones count from after the callback."""
        nonlocal moment, started
        _wait_for(device)
        now = time.perf_counter()
        seconds = now - moment
        callback()
        moment = time.perf_counter()
        started += moment - now
        return seconds

    def prepare(executor: Any, *args: Any, **kwargs: Any) -> Any:
        found = executor(*args, **kwargs)
        timing.loading = take(on_loaded)
        return found

    def step(*_: Any) -> None:
        timing.steps.append(take(on_step))
        management.throw_exception_if_processing_interrupted()

    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, prepare)
    found = sample(clone, *prompts, latent, sampling, step)
    _wait_for(device)
    timing.total = time.perf_counter() - started
    return found, timing


def unload_everything() -> None:
    """So that a model loads as it does first, and others do not take its memory."""
    management.unload_all_models()
    management.soft_empty_cache()


def loaded_bytes(patcher: Any) -> int:
    """Of the model's weights that are on its device, as ComfyUI counts them."""
    return int(patcher.loaded_size())


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def step_counter(total: int) -> Callable[[], None]:
    """A progress bar of the running node; each call is one step of `total`."""
    bar = comfy.utils.ProgressBar(total)
    return lambda: bar.update(1)
