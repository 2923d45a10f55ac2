"""A memory budget between the stock nodes of one running server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from comfy_server import ComfyServer, WorkflowError
from tiny import make_tiny_vae
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent

pytestmark = pytest.mark.comfy

# Outputs of the node.
MODEL, VAE, REPORT = 0, 2, 4


def within(workflow: Workflow, budget_gb: float, **links: object) -> Workflow:
    """The workflow with the node behind its loaders; the report is in outputs["report"]["text"]."""
    size = {"width": 64, "height": 64, "batch_size": 1}
    workflow["budget"] = {
        "class_type": "SnugMemoryBudget",
        "inputs": {"model": ["model", 0], "budget_gb": budget_gb, **size, **links},
    }
    workflow["sampler"]["inputs"]["model"] = ["budget", MODEL]
    if "vae" in links:
        workflow["decode"]["inputs"]["vae"] = ["budget", VAE]
    workflow["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["budget", REPORT]}}
    return workflow


@pytest.mark.parametrize("family", ["sd15", "wan"])
def test_in_and_out_of_a_workflow(
    family: str, twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    make_tiny_vae(comfy_server.base / "models" / "vae_approx", "taesd")
    file = twins(family, "Q8_0").gguf.name
    has_vae = family == "sd15"

    def build() -> Workflow:
        return build_workflow(family, "snug", file, steps=2, decode=has_vae)

    links = {"latent": ["latent", 0], **({"vae": ["vae", 0]} if has_vae else {})}
    outputs = [comfy_server.run(workflow) for workflow in (build(), within(build(), 4.0, **links), build())]
    plain, *others = [saved_latent(comfy_server, output) for output in outputs]
    assert all(other.equal(plain) for other in others)
    report = outputs[1]["report"]["text"][0]
    assert report.startswith("ComfyUI runs on the CPU")
    assert "Memory budget: 4.0 GB" in report
    assert ("Decoding: " in report) == has_vae
    latent = "1 × 4 × 8 × 8" if has_vae else "1 × 16 × 2 × 8 × 8"
    assert f"latent of {latent}" in report


def test_too_small_a_budget(twins: Callable[[str, str], Twins], comfy_server: ComfyServer) -> None:
    file = twins("sd3", "Q4_0").gguf.name
    with pytest.raises(WorkflowError, match=r"sampling needs at least \d") as caught:
        comfy_server.run(within(build_workflow("sd3", "snug", file), 1.0))
    assert caught.value.node_type == "SnugMemoryBudget"
    assert "\n" not in str(caught.value) and "choose a lower resolution" in str(caught.value)
    assert comfy_server.run(within(build_workflow("sd3", "snug", file, steps=1), 2.0))["save"]
