"""The text-encoder node in the real server: a prompt through GGUF files gives the dense files' latent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from comfy_server import ComfyServer, WorkflowError
from safetensors.torch import save_file
from text_encoder_files import add, finish
from twins import Twins
from workflows import Workflow, build_workflow, saved_latent

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture
def clip_l(comfy_server: ComfyServer, comfyui_path: Path) -> dict[str, str]:
    """File names of a CLIP-L (full size, random) in float16: GGUF and safetensors."""
    from tiny import use_comfyui

    use_comfyui(comfyui_path)
    import comfy.clip_model
    import comfy.ops

    config = json.loads((comfyui_path / "comfy" / "sd1_clip_config.json").read_text())
    module = comfy.clip_model.CLIPTextModel(config, torch.float32, "meta", comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        scale = 0.02 if value.dim() == 2 else 0.1
        weights[name] = (noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)).half()
    weights.pop("text_projection.weight")
    folder = comfy_server.base / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "clip_l.safetensors")
    writer = gguf.GGUFWriter(folder / "clip_l.gguf", "clip_l")
    for name, tensor in weights.items():
        add(writer, name, tensor, "F16")
    finish(writer, folder / "clip_l.gguf")
    return {"gguf": "clip_l.gguf", "dense": "clip_l.safetensors"}


def with_prompts(workflow: Workflow, loader: str, inputs: dict[str, Any]) -> Workflow:
    workflow["clip"] = {"class_type": loader, "inputs": inputs}
    for name, text in (("positive", "a red fox under the moon"), ("negative", "blurry")):
        workflow[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": text}}
    return workflow


def test_prompts_through_gguf(
    comfy_server: ComfyServer, clip_l: dict[str, str], twins: Callable[[str, str], Twins]
) -> None:
    model = twins("sd3", "Q8_0").gguf.name
    latents = []
    for loader, inputs in (
        ("SnugLoadTextEncoders", {"text_encoder_1": clip_l["gguf"], "type": "sd3"}),
        ("CLIPLoader", {"clip_name": clip_l["dense"], "type": "sd3"}),
    ):
        workflow = with_prompts(build_workflow("sd3", "snug", model, output=loader), loader, inputs)
        latents.append(saved_latent(comfy_server, comfy_server.run(workflow)))
    assert (latents[0] - latents[1]).norm() < 0.01 * latents[1].norm()


def test_wrong_type_in_the_error_panel(
    comfy_server: ComfyServer, clip_l: dict[str, str], twins: Callable[[str, str], Twins]
) -> None:
    inputs = {"text_encoder_1": clip_l["gguf"], "type": "wan", "text_encoder_2": "none", "mmproj": "auto"}
    workflow = build_workflow("sd3", "snug", twins("sd3", "Q8_0").gguf.name)
    with pytest.raises(WorkflowError, match=r"clip_l\.gguf: this is CLIP-L.*choose type .*sd3"):
        comfy_server.run(with_prompts(workflow, "SnugLoadTextEncoders", inputs))
