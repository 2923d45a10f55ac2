"""Drawing digits in process, by the code that ComfyUI's own nodes call."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from .data import LATENT
from .prompts import NOTHING, prompts

STEPS, GUIDANCE = 8, 3.0
SAMPLER, SCHEDULER = "euler", "simple"


def draw(
    model: Any, classes: Sequence[int], seed: int = 0, steps: int = STEPS, guidance: float = GUIDANCE
) -> torch.Tensor:
    """A latent for each of the classes, float32 [N, 16, 1, 8, 8], by a MODEL. The same seed is the same noise."""
    return draw_prompts(model, prompts(classes), prompts([NOTHING]), seed, steps, guidance)


def draw_prompts(
    model: Any,
    positive: torch.Tensor,
    negative: torch.Tensor,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """The same for embedded prompts [N, tokens, 4096] and one that it is led away from [1, tokens, 4096]."""
    sample = importlib.import_module("comfy.sample")
    empty = torch.zeros(len(positive), *LATENT)
    return sample.sample(
        model,
        sample.prepare_noise(empty, seed),
        steps,
        guidance,
        SAMPLER,
        SCHEDULER,
        [[positive, {}]],
        [[negative, {}]],
        empty,
        disable_pbar=True,
        seed=seed,
    )
