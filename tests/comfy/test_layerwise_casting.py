"""Layerwise casting between the stock nodes of one running server: with LoRA on either side, and taken out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer
from tiny import make_tiny_lora
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent, with_casting

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_in_and_out_of_a_workflow(
    family: str, source: Callable[[str], Path], twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    folder = comfy_server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    make_tiny_lora(source(family), folder / "a.safetensors", seed=1)
    dense = twins(family, "Q8_0").dense.name
    lora = [("a.safetensors", 0.8)]

    def build(loras: Any = ()) -> Workflow:
        return build_workflow(family, "dense", dense, loras=loras, steps=2)

    def latent(workflow: Workflow) -> torch.Tensor:
        outputs = comfy_server.run(workflow)
        if "report" in workflow:
            assert "layers cast to float8_" in outputs["report"]["text"][0]
            assert " MB saved" in outputs["report"]["text"][0]
        return saved_latent(comfy_server, outputs)

    def error(value: torch.Tensor, reference: torch.Tensor) -> float:
        return ((value - reference).norm() / reference.norm()).item()

    plain, patched = latent(build()), latent(build(lora))
    cast = latent(with_casting(build(), "model"))
    assert 1e-4 < error(cast, plain) < 0.1
    before = latent(with_casting(build(lora), "lora_0"))
    after = latent(with_casting(build(lora), "model"))
    assert error(before, after) < 1e-4
    assert error(before - cast, patched - plain) < 0.3
    assert error(before, plain) > 2 * error(cast, plain), "the LoRA has no effect"
    assert latent(build()).equal(plain), "without the node nothing must be left"
