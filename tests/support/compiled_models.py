"""Compiled models in this process: loading them in every way, one prediction, and counting what is compiled."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from workflows import SETUPS


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(patcher: Any, **settings: Any) -> Any:
    """What the node makes of `patcher`, with a backend that needs no compiler unless `settings` say otherwise."""
    from snug.nodes.adapter.compilation import CompileSettings, compile_model

    return compile_model(patcher, CompileSettings(**{"backend": "aot_eager", "fullgraph": True, **settings}))


# Family: width of the context, of the pooled text, channels of the latent.
CONDITIONS = {"sd3": (4096, 2048, 16), "flux": (512, 768, 16), "sd15": (768, 0, 4)}
# What makes the latent of a family [batch, channels, frames, height, width].
FRAMES = {"wan": 2, "hunyuan_video": 2, "ltxv": 2, "qwen_image": 1}


def predict(
    patcher: Any,
    family: str,
    side: int = 8,
    tokens: int = 77,
    batch: int = 1,
    seed: int = 7,
    height: int | None = None,
    **conditions: Any,
) -> Any:
    """One prediction with the options that ComfyUI's sampler gives, however the model is loaded at the moment.

    side: width, and height where that is not given, of the latent. conditions: more that nodes add to the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    setup = SETUPS[family]
    model = patcher.model
    extra = dict(conditions)
    if setup.pooled:
        width = model.adm_channels if family == "sdxl" else setup.pooled
        extra["y"] = torch.randn(batch, width, generator=generator)
    if family in ("flux", "hunyuan_video"):
        extra["guidance"] = torch.full((batch,), 3.5)
    if setup.attention_mask:
        extra["attention_mask"] = torch.ones(batch, tokens, dtype=torch.int64)
    if family == "lumina2":
        extra["num_tokens"] = tokens
    sigma = model.model_sampling.sigma_max * torch.full((batch,), 0.5)
    options = dict(patcher.model_options["transformer_options"])
    options.update(sigmas=sigma, sample_sigmas=sigma, cond_or_uncond=list(range(batch)), uuids=[object()])
    options["wrappers"] = patcher.wrappers
    sizes = [FRAMES[family]] if family in FRAMES else []
    shape = (batch, model.latent_format.latent_channels, *sizes, height or side, side)
    with torch.inference_mode():  # as ComfyUI runs every node
        return model.apply_model(
            torch.randn(shape, generator=generator),
            sigma,
            c_crossattn=torch.randn(batch, tokens, setup.embedding[1], generator=generator),
            transformer_options=options,
            **extra,
        )


def load_part(patcher: Any, budget: int) -> None:
    """ComfyUI's low-VRAM state: what exceeds the budget, in bytes, is offloaded and cast as it is used."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    patcher.detach()
    patcher.patch_model(patcher.load_device, lowvram_model_memory=budget)
    assert patcher.model.model_lowvram


@contextlib.contextmanager
def compiles(at_most: int) -> Iterator[None]:
    """Checks how many graphs are compiled in the block."""
    counters = importlib.import_module("torch._dynamo.utils").counters
    before = counters["stats"]["unique_graphs"]
    yield
    assert counters["stats"]["unique_graphs"] - before <= at_most
