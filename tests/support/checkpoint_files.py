"""All-in-one checkpoints of small models, in the names of ComfyUI's own and of stable-diffusion.cpp's."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from text_encoder_files import add, finish, snap
from tiny import make_tiny_model, make_tiny_vae

Tensors = dict[str, torch.Tensor]
CONFIGS = {"clip_l": "sd1_clip_config.json", "clip_g": "clip_config_bigg.json"}


def shrink_clip(monkeypatch: pytest.MonkeyPatch, layers: int = 2) -> None:
    """ComfyUI's CLIP classes with few and narrow layers; width and vocabulary are what it tells them apart by."""
    clip_model = importlib.import_module("comfy.clip_model")
    original = clip_model.CLIPTextModel_

    def build(config: Mapping[str, Any], *args: Any) -> Any:
        return original({**config, "num_hidden_layers": layers, "intermediate_size": 128}, *args)

    monkeypatch.setattr(clip_model, "CLIPTextModel_", build)


def clip_weights(comfyui: Path, kind: str, seed: int = 0) -> Tensors:
    """Random float32 weights of ComfyUI's CLIP class of this kind, as small as it is now."""
    clip_model, ops = importlib.import_module("comfy.clip_model"), importlib.import_module("comfy.ops")
    config = json.loads((comfyui / "comfy" / CONFIGS[kind]).read_text())
    module = clip_model.CLIPTextModel(config, torch.float32, "meta", ops.manual_cast)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 2:
            weights[name] = noise * (0.02 if "embedding" in name else value.shape[1] ** -0.5)
        else:
            weights[name] = noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return weights


def taesd(folder: Path, name: str) -> Tensors:
    """A TAESD pair under the names that make it the VAE of a checkpoint."""
    tensors = {}
    for path in make_tiny_vae(folder, name):
        part = path.stem.rpartition("_")[2]
        tensors.update({f"taesd_{part}.{key}": value for key, value in load_file(path).items()})
    return tensors


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def diffusion_weights(folder: Path, family: str) -> Tensors:
    path = folder / f"{family}.safetensors"
    make_tiny_model(family, path)
    return {name: value.float() for name, value in load_file(path).items()}


def openclip_names(weights: Mapping[str, torch.Tensor]) -> Tensors:
    """CLIP-G as in SDXL's checkpoints: attention in one tensor, the projection transposed."""
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    tops = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    found = {new: weights[name] for name, new in tops.items()}
    found["text_projection"] = weights["text_projection.weight"].T.contiguous()
    for name in weights:
        _, layer, rest = name.rpartition("text_model.encoder.layers.")
        if not layer:
            continue
        number, _, part = rest.partition(".")
        module, _, kind = part.rpartition(".")
        block = f"transformer.resblocks.{number}."
        if module == "self_attn.q_proj":
            joined = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"{block}attn.in_proj_{kind}"] = torch.cat(joined)
        elif module in parts:
            found[f"{block}{parts[module]}.{kind}"] = weights[name]
        elif module == "self_attn.out_proj":
            found[f"{block}attn.out_proj.{kind}"] = weights[name]
    return found


def write_sdcpp(path: Path, tensors: Mapping[str, torch.Tensor], format: str = "Q8_0") -> Path:
    """As stable-diffusion.cpp: no metadata worth mentioning, matrices quantized wherever they are."""
    writer = gguf.GGUFWriter(path, "none")
    for name, tensor in tensors.items():
        add(writer, name, tensor, format)
    return finish(writer, path)


def snapped(tensors: Mapping[str, torch.Tensor], format: str) -> Tensors:
    """What is left of the weights in a file of `write_sdcpp`."""
    return {
        name: snap(value, format) if value.dim() == 2 and value.shape[1] % 32 == 0 else value
        for name, value in tensors.items()
    }
