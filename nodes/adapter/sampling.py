"""Sampling a MODEL as ComfyUI's KSampler does, for nodes that look at what happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from .compat import supported_arguments

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


@dataclass(frozen=True, slots=True)
class Sampling:
    """As KSampler takes it."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0


def sample(
    patcher: Any,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    sampling: Sampling,
    on_step: Callable[..., None],
    number: int = 0,
) -> torch.Tensor:
    """The latent that common_ksampler in ComfyUI's nodes.py makes, without preview.

    positive, negative: CONDITIONING; latent: LATENT. on_step: called in each step with its number, from 0, and more.
    number: is added to the seed.
    """
    ratios = {key: latent.get(key) for key in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    fix = comfy.sample.fix_empty_latent_channels
    image = fix(patcher, latent["samples"], **supported_arguments(fix, **ratios))
    seed = (sampling.seed + number) % 2**64
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    return comfy.sample.sample(
        patcher,
        noise,
        sampling.steps,
        sampling.cfg,
        sampling.sampler_name,
        sampling.scheduler,
        positive,
        negative,
        image,
        denoise=sampling.denoise,
        noise_mask=latent.get("noise_mask"),
        callback=on_step,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
