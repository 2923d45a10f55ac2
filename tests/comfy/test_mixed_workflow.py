"""One workflow with files of four kinds: a GGUF T5, a scaled-FP8 CLIP-L, an NF4 Flux and a LoRA for both.

The reference is the same weights dequantized, in plain files, through ComfyUI's own nodes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer
from quantized_files import dense_tensors, quantize_tensors, quantized_twins
from safetensors.torch import load_file, save_file
from text_encoder_files import snap, write_text_encoder
from tiny import make_tiny_lora, use_comfyui
from workflows import SETUPS, Workflow, build_workflow, saved_latent

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

Files = dict[str, str]
WIDTH = SETUPS["flux"].embedding[1]  # what the tiny Flux takes from T5
T5_SIZES = {"d_model": WIDTH, "d_ff": 512, "d_kv": 32, "num_heads": 8, "num_layers": 2}


def random_weights(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 2:
            weights[name] = noise / value.shape[1] ** 0.5
        else:
            weights[name] = 0.1 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
    return weights


@pytest.fixture
def text_encoders(comfy_server: ComfyServer, comfyui_path: Path) -> Files:
    use_comfyui(comfyui_path)
    import comfy.clip_model
    import comfy.ops
    from comfy.text_encoders import t5

    folder, source = comfy_server.base / "models" / "text_encoders", comfyui_path / "comfy"
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "text_encoders" / "t5_config_xxl.json").read_text()) | T5_SIZES
    weights = random_weights(t5.T5(config, torch.float32, "meta", comfy.ops.manual_cast), seed=1)
    weights = {
        name: snap(value, "Q8_0") if value.dim() == 2 and value.shape[1] % 32 == 0 else value
        for name, value in weights.items()
    }
    write_text_encoder(folder / "t5.gguf", weights, "t5encoder")
    save_file(weights, folder / "t5.safetensors")

    config = json.loads((source / "sd1_clip_config.json").read_text())
    module = comfy.clip_model.CLIPTextModel(config, torch.float32, "meta", comfy.ops.manual_cast)
    clip = {name: value for name, value in random_weights(module, 2).items() if "projection" not in name}
    tensors, metadata = quantize_tensors(clip, "fp8")
    save_file(tensors, folder / "clip_fp8.safetensors", metadata=metadata)
    save_file(dense_tensors(folder / "clip_fp8.safetensors"), folder / "clip.safetensors")
    return {
        "gguf": "t5.gguf",
        "dense t5": "t5.safetensors",
        "fp8": "clip_fp8.safetensors",
        "dense": "clip.safetensors",
    }


def make_lora(model: Path, path: Path) -> None:
    """For the diffusion model and, strong enough to see, for CLIP-L and T5."""
    make_tiny_lora(model, path)
    tensors, generator = load_file(path), torch.Generator().manual_seed(3)
    for stem, rows, columns in (
        *((f"clip_l.transformer.text_model.encoder.layers.{n}.mlp.fc1", 3072, 768) for n in range(12)),
        ("t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.v", 256, WIDTH),
    ):
        tensors[f"text_encoders.{stem}.lora_A.weight"] = (
            torch.randn(4, columns, generator=generator) / columns**0.5
        )
        tensors[f"text_encoders.{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.5
    save_file(tensors, path)


def workflow(
    loader: str, model: str, clip: tuple[str, dict[str, Any]], lora: tuple[float, float] | None
) -> Workflow:
    found = build_workflow("flux", "snug" if loader == "snug" else "dense", model, steps=2, output=loader)
    found["clip"] = {"class_type": clip[0], "inputs": clip[1]}
    source = "clip", 0
    if lora is not None:
        inputs = {"model": ["model", 0], "clip": ["clip", 0], "lora_name": "mixed.safetensors"}
        inputs |= {"strength_model": lora[0], "strength_clip": lora[1]}
        found["lora"] = {"class_type": "LoraLoader", "inputs": inputs}
        found["sampler"]["inputs"]["model"] = ["lora", 0]
        source = "lora", 1
    for name, text in (("positive", "a (red:1.2) fox under the moon"), ("negative", "blurry")):
        found[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": list(source), "text": text}}
    return found


def test_gguf_t5_fp8_clip_nf4_flux_and_a_lora(
    comfy_server: ComfyServer, text_encoders: Files, source: Callable[[str], Path]
) -> None:
    models = comfy_server.base / "models"
    for name in ("diffusion_models", "loras"):
        (models / name).mkdir(exist_ok=True)
    pair = quantized_twins(source("flux"), models / "diffusion_models", "nf4")
    make_lora(source("flux"), models / "loras" / "mixed.safetensors")
    snug = {"text_encoder_1": text_encoders["gguf"], "text_encoder_2": text_encoders["fp8"], "type": "flux"}
    core = {"clip_name1": text_encoders["dense"], "clip_name2": text_encoders["dense t5"], "type": "flux"}

    def run(lora: tuple[float, float] | None) -> tuple[torch.Tensor, torch.Tensor]:
        runs = (
            workflow("snug", pair.gguf.name, ("SnugLoadTextEncoders", snug), lora),
            workflow("dense", pair.dense.name, ("DualCLIPLoader", core), lora),
        )
        first, second = (saved_latent(comfy_server, comfy_server.run(found)) for found in runs)
        return first, second

    found = [run(lora) for lora in ((0.7, 0.9), (0.7, 0.0), None)]
    for packed, dense in found:
        assert (packed - dense).norm() < 0.01 * dense.norm()
    # What the LoRA changes is seen, in both models: in the text encoders by how it does.
    changes = [[packed - found[2][number] for number, packed in enumerate(latents)] for latents in found[:2]]
    in_text = [(first - second).norm() for first, second in zip(*changes, strict=True)]
    assert min(change.norm() for change in changes[1]) > 0.02 * dense.norm()
    assert in_text[0] > 0.001 * dense.norm() and abs(in_text[0] - in_text[1]) < 0.1 * in_text[1]
