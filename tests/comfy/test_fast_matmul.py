"""Fast Matmul and Spare Memory Cache between the stock nodes of one running server, and taken out again."""

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

# Pixels: enough tokens for products in 8 bits to be used.
SIZE = 128


@pytest.mark.parametrize(("family", "format"), [("flux", "Q4_K"), ("sd3", "nf4"), ("wan", "Q8_0")])
def test_in_and_out_of_a_workflow(
    family: str,
    format: str,
    source: Callable[[str], Path],
    twins: Callable[[str, str], Twins],
    comfy_server: ComfyServer,
) -> None:
    name = twins(family, format).gguf.name

    def build(loras: Any = ()) -> Workflow:
        return build_workflow(family, "snug", name, steps=2, size=SIZE, loras=loras)

    def fast(workflow: Workflow, **inputs: Any) -> Workflow:
        settings = {"mode": "int8", "leave_out": "default", "keep_rounded": True, **inputs}
        return with_node(workflow, "model", "fast", "SnugFastMatmul", **settings)

    def cached(workflow: Workflow) -> Workflow:
        return with_node(workflow, "model", "cache", "SnugSpareMemoryCache", limit_gb=0.0)

    def run(workflow: Workflow) -> tuple[torch.Tensor, str]:
        outputs = comfy_server.run(workflow)
        return saved_latent(comfy_server, outputs), outputs.get("report", {}).get("text", [""])[0]

    def error(value: torch.Tensor, reference: torch.Tensor) -> float:
        return ((value - reference).norm() / reference.norm()).item()

    plain, _ = run(build())
    kept, report = run(cached(build()))
    assert torch.equal(kept, plain)
    assert "copies of the weights of" in report
    rounded, report = run(fast(build()))
    assert 1e-5 < error(rounded, plain) < 0.05
    assert report.startswith("fast matmul: int8 in ")
    if family != "flux":  # what follows is the same for all, and takes its time
        return
    folder = comfy_server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    make_tiny_lora(source(family), folder / f"{family}-fast.safetensors", seed=1)
    lora = [(f"{family}-fast.safetensors", 0.8)]
    patched, _ = run(build(lora))
    beside, _ = run(fast(cached(build(lora))))
    assert 1e-5 < error(beside, patched) < 0.05 < error(plain, patched)
    assert torch.equal(run(fast(build(), mode="off"))[0], plain)
    assert torch.equal(run(build())[0], plain), "without the nodes nothing must be left"
