"""On a CUDA device: a budget that the weights do not fit into is kept by what torch has allocated."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_model, use_comfyui

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.comfy,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GIGABYTE = 1 << 30
# What ComfyUI keeps free at least, small enough that the weights of a tiny model count.
LEAST_FREE = 256 << 20


@pytest.fixture
def patcher(comfyui_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    use_comfyui(comfyui_path)
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: LEAST_FREE)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    make_tiny_model("sd15", tmp_path / "model.safetensors")
    torch.set_grad_enabled(False)
    yield importlib.import_module("comfy.sd").load_diffusion_model(str(tmp_path / "model.safetensors"))
    management.unload_all_models()


def sample(patcher: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    conditioning = [[torch.randn(1, 77, 768, generator=generator), {}]]
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    settings = (2, 2.0, "euler", "normal", conditioning, conditioning, torch.zeros_like(noise))
    return importlib.import_module("comfy.sample").sample(
        patcher, noise, *settings, disable_pbar=True, seed=0
    )


def test_within_the_budget(patcher: Any) -> None:
    from snug.nodes.adapter.memory_budget import ImageSize, Models, apply_budget

    wanted = sample(patcher)
    budget = int(0.6 * patcher.model_size()) + LEAST_FREE
    models, report = apply_budget(budget / GIGABYTE, Models(patcher), ImageSize(64, 64, 1))
    assert "streamed" in report
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        assert (sample(models.model) - wanted).norm() < 0.02 * wanted.norm()
    assert torch.cuda.max_memory_allocated() <= budget
    assert (sample(patcher) - wanted).norm() < 0.02 * wanted.norm()
