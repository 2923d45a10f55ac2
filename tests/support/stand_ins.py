"""Tiny models with random weights under the names of files that the example workflows use."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from checkpoint_files import taesd
from native_quantizer import native_quantizer
from safetensors.torch import load_file, save_file
from small_text_encoders import random_weights
from snug.quant_backends.writers.gguf_file import write_gguf
from text_encoder_files import write_text_encoder
from tiny import make_tiny_model, use_comfyui
from workflows import SETUPS

# Width as the tiny Flux takes it.
T5_SIZES = {"d_model": SETUPS["flux"].embedding[1], "d_ff": 512, "d_kv": 32, "num_heads": 8, "num_layers": 2}


def write_flux(models: Path, comfyui: Path, scratch: Path) -> None:
    """A Flux with its text encoders and VAE into ComfyUI's folder `models`; `scratch`: for files on the way.

    The server needs the nodes of the tests, which let it take the tiny Flux and T5.
    """
    use_comfyui(comfyui)
    for name in ("diffusion_models", "text_encoders", "vae"):
        (models / name).mkdir(parents=True, exist_ok=True)
    make_tiny_model("flux", scratch / "flux.safetensors")
    flux = models / "diffusion_models" / "flux1-dev-Q4_K_S.gguf"
    write_gguf(flux, load_file(scratch / "flux.safetensors"), "Q4_K", quantizer=native_quantizer)
    encoders = models / "text_encoders"
    write_text_encoder(encoders / "t5-v1_1-xxl-encoder-Q8_0.gguf", _t5(comfyui), "t5encoder")
    save_file(_clip_l(comfyui), encoders / "clip_l.safetensors")
    save_file(taesd(scratch, "taef1"), models / "vae" / "ae.safetensors")


def _t5(comfyui: Path) -> dict[str, torch.Tensor]:
    import comfy.ops
    from comfy.text_encoders import t5

    config = json.loads((comfyui / "comfy" / "text_encoders" / "t5_config_xxl.json").read_text())
    return random_weights(t5.T5(config | T5_SIZES, torch.float32, "meta", comfy.ops.manual_cast), "Q8_0")


def _clip_l(comfyui: Path) -> dict[str, torch.Tensor]:
    import comfy.clip_model
    import comfy.ops

    config = json.loads((comfyui / "comfy" / "sd1_clip_config.json").read_text())
    module = comfy.clip_model.CLIPTextModel(config, torch.float32, "meta", comfy.ops.manual_cast)
    weights = random_weights(module, "F32")
    return {name: value.half() for name, value in weights.items() if "projection" not in name}
