"""Quantize, save, load again between the stock nodes of one running server: the same latents on every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy_server import ComfyServer, WorkflowError
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent, with_node

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(
    ("family", "target", "ending"),
    [("wan", "GGUF Q4_0", "gguf"), ("sd3", "FP8 e4m3fn per row", "safetensors")],
)
def test_quantize_save_load(
    family: str,
    target: str,
    ending: str,
    twins: Callable[[str, str], Twins],
    comfy_server: ComfyServer,
) -> None:
    files = twins(family, "F32")
    saved = files.dense.parent / f"saved.{ending}"

    def latent(workflow: Workflow) -> torch.Tensor:
        return saved_latent(comfy_server, comfy_server.run(workflow))

    plain = latent(build_workflow(family, "dense", files.dense.name, steps=2))
    workflow = build_workflow(family, "dense", files.dense.name, steps=2)
    with_node(workflow, "model", "quantize", "SnugQuantizeModel", target=target, skip_patterns="default")
    workflow["keep"] = {
        "class_type": "SnugSaveModel",
        "inputs": {
            "model": ["quantize", 0],
            "filename_prefix": "diffusion_models/saved",
            "format": "auto",
            "if_exists": "replace",
            "folder": "models folder",
        },
    }
    try:
        outputs = comfy_server.run(workflow)
        quantized = saved_latent(comfy_server, outputs)
        assert f"layers quantized to {target}" in outputs["report"]["text"][0]
        assert Path(outputs["keep"]["text"][0]) == saved
        assert not torch.equal(quantized, plain)
        assert torch.equal(latent(build_workflow(family, "snug", saved.name, steps=2)), quantized)
        on_load = build_workflow(family, "snug", files.dense.name, steps=2)
        on_load["model"]["inputs"]["quantize"] = target
        assert torch.allclose(latent(on_load), quantized, rtol=1e-5, atol=1e-5)
        workflow["keep"]["inputs"] |= {"filename_prefix": "../saved"}
        with pytest.raises(WorkflowError, match="is no name inside") as caught:
            comfy_server.run(workflow)
        assert caught.value.node_type == "SnugSaveModel"
    finally:
        comfy_server.free()
        saved.unlink(missing_ok=True)
