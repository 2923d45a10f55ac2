"""SnugTorchCompile in the real server: beside LoRA and casting, on quantized and plain models, and bypassed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer
from tiny import make_tiny_lora
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent, with_casting

pytestmark = pytest.mark.comfy

SETTINGS = {
    "backend": "aot_eager",
    "mode": "default",
    "scope": "regional (repeated blocks)",
    "fullgraph": True,
    "dynamic": "auto",
    "fallback_to_eager": False,
}


def compiled(workflow: Workflow, **settings: Any) -> Workflow:
    """The workflow with what the sampler samples compiled first."""
    inputs = {"model": workflow["sampler"]["inputs"]["model"], **SETTINGS, **settings}
    workflow["compile"] = {"class_type": "SnugTorchCompile", "inputs": inputs}
    workflow["sampler"]["inputs"]["model"] = ["compile", 0]
    return workflow


@pytest.mark.parametrize(("family", "loader"), [("sd3", "snug"), ("flux", "snug"), ("sd3", "dense")])
def test_compiled_equals_plain(
    family: str,
    loader: Any,
    source: Callable[[str], Any],
    twins: Callable[[str, str], Twins],
    comfy_server: ComfyServer,
) -> None:
    folder = comfy_server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    make_tiny_lora(source(family), folder / "compiled.safetensors", seed=3)
    pair = twins(family, "Q4_0")
    file = pair.gguf.name if loader == "snug" else pair.dense.name

    def workflow(**options: Any) -> Workflow:
        return build_workflow(family, loader, file, steps=2, **options)

    def run(workflow: Workflow) -> torch.Tensor:
        return saved_latent(comfy_server, comfy_server.run(workflow))

    states: list[dict[str, Any]] = [
        {},
        {"loras": [("compiled.safetensors", 0.7)]},
        {"size": 96},
        {"seed": 5},
    ]
    plain = [run(workflow(**state)) for state in states]
    assert not torch.allclose(plain[0], plain[1], atol=1e-2), "the LoRA has no effect"
    for wanted, state in zip(plain, states, strict=True):
        assert torch.allclose(run(compiled(workflow(**state))), wanted, atol=1e-4)
    cast = run(with_casting(workflow(), "model"))
    assert torch.allclose(run(compiled(with_casting(workflow(), "model"))), cast, atol=1e-4)
    assert torch.equal(run(workflow()), plain[0]), "without the node the model must be as before"
