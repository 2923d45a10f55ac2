"""The tiny models as ComfyUI's own loaders take them: what other tests compare with must be worth it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_server import ComfyServer
from safetensors.torch import load_file
from tiny import FAMILIES, make_tiny_lora, make_tiny_model, make_tiny_vae, use_comfyui
from workflows import SETUPS, Lora, build_workflow, saved_latent

# SD1.5 has folded rows and kernels, HunyuanVideo other names in files than in ComfyUI's modules.
LORA_FAMILIES = ["sd15", "hunyuan_video"]
IMAGE_FAMILIES = ["sd15", "sd3"]  # 4 and 16 latent channels

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def server(comfy_server: ComfyServer, comfyui_path: Path) -> ComfyServer:
    """The server with the models, LoRAs and autoencoders of the families above."""
    use_comfyui(comfyui_path)
    models = comfy_server.base / "models"
    (models / "loras").mkdir(parents=True, exist_ok=True)
    for family in {*LORA_FAMILIES, *IMAGE_FAMILIES}:
        dense = models / "diffusion_models" / f"{family}.safetensors"
        make_tiny_model(family, dense)
        make_tiny_lora(dense, models / "loras" / dense.name)
        vae = SETUPS[family].vae
        if vae is not None:
            make_tiny_vae(models / "vae_approx", vae)
    return comfy_server


def sample(server: ComfyServer, family: str, *loras: Lora) -> torch.Tensor:
    outputs = server.run(build_workflow(family, "dense", f"{family}.safetensors", steps=2, loras=loras))
    return saved_latent(server, outputs)


def test_every_family_has_a_workflow() -> None:
    assert SETUPS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_lora_shows_in_proportion(server: ComfyServer, family: str) -> None:
    dense = sample(server, family)
    full, tenth = (sample(server, family, (f"{family}.safetensors", strength)) for strength in (1.0, 0.1))
    assert (full - dense).norm() > 0.05 * dense.norm()
    assert (tenth - dense).norm() == pytest.approx(0.1 * (full - dense).norm(), rel=0.5)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_images_are_decoded(server: ComfyServer, family: str) -> None:
    outputs = server.run(build_workflow(family, "dense", f"{family}.safetensors", steps=2, decode=True))
    assert saved_latent(server, outputs).isfinite().all()
    assert server.view(outputs["image"]["images"][0]).startswith(b"\x89PNG")


def test_model_info_counts_every_tensor(server: ComfyServer) -> None:
    outputs = server.run(build_workflow("sd3", "dense", "sd3.safetensors", steps=1, model_info=True))
    info = json.loads(outputs["info"]["model_info"][0])
    stored = load_file(server.base / "models" / "diffusion_models" / "sd3.safetensors")
    weights = sum(tensor.numel() for tensor in stored.values())
    assert info["parameters"] == {
        "Tensor:torch.float32": {"count": len(stored), "weights": weights, "bytes": 4 * weights}
    }
    assert info["loaded_size"] == info["model_size"] >= 4 * weights
