"""Inputs that several nodes share: how to sample, as KSampler has them."""

from __future__ import annotations

from comfy_api.latest import io

from .adapter.sampling import SAMPLERS, SCHEDULERS


def sampling_inputs(seed: str, steps: str) -> list[io.Input]:
    """seed, steps, cfg, sampler_name, scheduler and denoise. seed, steps: their tooltips."""
    return [
        io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip=seed),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=steps),
        io.Float.Input(
            "cfg",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Classifier-free guidance, as you sample with.",
        ),
        io.Combo.Input("sampler_name", options=SAMPLERS, tooltip="The sampler that you use with this model."),
        io.Combo.Input("scheduler", options=SCHEDULERS, tooltip="The scheduler that you use with it."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Below 1, sampling begins with latent_image instead of noise, as in image to image.",
        ),
    ]
