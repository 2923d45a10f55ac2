"""LoRA Mode between the stock nodes of one running server, beside a model without it, and taken out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer
from tiny import make_tiny_lora
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent, with_node

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(("family", "format"), [("sd3", "Q8_0"), ("flux", "nf4")])
def test_modes_in_a_workflow(
    family: str,
    format: str,
    source: Callable[[str], Path],
    twins: Callable[[str, str], Twins],
    comfy_server: ComfyServer,
) -> None:
    folder = comfy_server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    make_tiny_lora(source(family), folder / f"{family}-mode.safetensors", seed=1)
    file = twins(family, format)

    def build(loader: Any = "snug", strength: float = 0.8) -> Workflow:
        name = file.gguf.name if loader == "snug" else file.dense.name
        return build_workflow(
            family,
            loader,
            name,
            loras=[(f"{family}-mode.safetensors", strength)] if strength else (),
            steps=2,
        )

    def run(workflow: Workflow) -> tuple[torch.Tensor, str]:
        outputs = comfy_server.run(workflow)
        return saved_latent(comfy_server, outputs), outputs.get("report", {}).get("text", [""])[0]

    def with_mode(workflow: Workflow, after: str, mode: str) -> Workflow:
        return with_node(workflow, after, "mode", "SnugLoraMode", mode=mode, cache_other_types=True)

    def error(value: torch.Tensor, reference: torch.Tensor) -> float:
        return ((value - reference).norm() / reference.norm()).item()

    today, _ = run(build())
    plain, _ = run(build(strength=0))
    dense, _ = run(build("dense"))
    assert error(today, plain) > 0.05, "the LoRA has no effect"
    for mode in ("automatic", "merge while dequantizing", "side branch"):
        for after in ("model", "lora_0"):
            latent, report = run(with_mode(build(), after, mode))
            assert error(latent, dense) < 1e-3, (mode, after)
            assert report.startswith(f"LoRA mode: {mode}")
            assert ("no LoRA here" in report) == (after == "model")
    latent, report = run(with_mode(build(), "lora_0", "bake in"))
    assert " layers baked" in report
    # What is baked in is rounded again: to 8 bits in the one model, to 4 in the other.
    assert error(latent, dense) < (0.2 if format == "nf4" else 0.05)
    again, _ = run(with_mode(build(strength=-0.4), "lora_0", "side branch"))
    assert error(again, today) > 0.05
    assert run(build())[0].equal(today), "without the node nothing must be left"
