"""Stock LoRA nodes on a GGUF model, strengths changed and LoRAs removed between runs of one server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy_server import ComfyServer
from tiny import make_tiny_lora
from twins import Twins
from workflows import Lora, build_workflow, saved_latent

pytestmark = pytest.mark.comfy

# In order, on one running server: none, one, two, one weaker, none again.
RUNS: list[list[Lora]] = [
    [],
    [("a.safetensors", 0.8)],
    [("a.safetensors", 0.8), ("b.safetensors", -0.5)],
    [("a.safetensors", 0.4)],
    [],
]


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_lora_changes_between_runs(
    family: str, source: Callable[[str], Path], twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    folder = comfy_server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate("ab"):
        make_tiny_lora(source(family), folder / f"{name}.safetensors", seed=seed)
    pair = twins(family, "Q4_0")

    def latents(loader: str, file: str) -> list[torch.Tensor]:
        workflows = [build_workflow(family, loader, file, loras=loras, steps=2) for loras in RUNS]  # type: ignore[arg-type]
        return [saved_latent(comfy_server, comfy_server.run(workflow)) for workflow in workflows]

    packed, dense = latents("snug", pair.gguf.name), latents("dense", pair.dense.name)
    for number in (1, 2, 3):
        wanted = dense[number] - dense[0]
        assert wanted.norm() > 0.02 * dense[0].norm()
        assert (packed[number] - packed[0] - wanted).norm() < 0.01 * wanted.norm()
    assert torch.equal(packed[4], packed[0]), "a removed LoRA must leave nothing behind"
