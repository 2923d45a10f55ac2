"""Tiny models with random weights under the names of files that the example workflows use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from checkpoint_files import prefixed, taesd
from native_quantizer import native_quantizer
from quantized_files import quantize_tensors
from safetensors.torch import load_file, save_file
from small_text_encoders import random_weights
from snug.quant_backends.writers.gguf_file import write_gguf
from text_encoder_files import write_text_encoder
from tiny import make_tiny_lora, make_tiny_model, use_comfyui
from workflows import SETUPS

# Width as the tiny Flux takes it.
T5_SIZES = {"d_model": SETUPS["flux"].embedding[1], "d_ff": 512, "d_kv": 32, "num_heads": 8, "num_layers": 2}


def write_stand_ins(models: Path, comfyui: Path, scratch: Path) -> None:
    """Every file that the example workflows name into ComfyUI's folder `models`; `scratch`: for files on the way.

    The server needs the nodes of the tests, which let it take the tiny Flux and T5.
    """
    use_comfyui(comfyui)
    for name in ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae"):
        (models / name).mkdir(parents=True, exist_ok=True)
    flux, t5, clip_l, vae = _flux(scratch), _t5(comfyui), _clip_l(comfyui), taesd(scratch, "taef1")
    diffusion, encoders = models / "diffusion_models", models / "text_encoders"
    write_gguf(diffusion / "flux1-dev-Q4_K_S.gguf", flux, "Q4_K", quantizer=native_quantizer)
    write_gguf(diffusion / "flux1-dev-Q8_0.gguf", flux, "Q8_0")
    save_file(flux, diffusion / "flux1-dev.safetensors")
    _save(diffusion / "flux_dev_fp8_scaled_diffusion_model.safetensors", flux, "fp8")
    make_tiny_lora(
        diffusion / "flux1-dev.safetensors", models / "loras" / "Hyper-FLUX.1-dev-8steps-lora.safetensors"
    )
    for name in ("t5-v1_1-xxl-encoder-Q8_0.gguf", "t5-v1_1-xxl-encoder-Q5_K_M.gguf"):
        write_text_encoder(encoders / name, t5, "t5encoder")
    _save(encoders / "t5xxl_fp8_e4m3fn_scaled.safetensors", t5, "fp8")
    save_file(clip_l, encoders / "clip_l.safetensors")
    save_file(vae, models / "vae" / "ae.safetensors")
    parts = {
        **prefixed("text_encoders.t5xxl.transformer.", {name: value.half() for name, value in t5.items()}),
        **prefixed("text_encoders.clip_l.transformer.", clip_l),
        **prefixed("vae.", vae),
    }
    checkpoint = models / "checkpoints" / "flux1-dev-bnb-nf4-v2.safetensors"
    _save(checkpoint, prefixed("model.diffusion_model.", flux), "nf4", parts)


def _save(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    kind: str,
    others: Mapping[str, torch.Tensor] | None = None,
) -> None:
    packed, metadata = quantize_tensors(tensors, kind)
    save_file(
        {name: value.contiguous() for name, value in {**packed, **(others or {})}.items()},
        path,
        metadata=metadata,
    )


def _flux(scratch: Path) -> dict[str, torch.Tensor]:
    make_tiny_model("flux", scratch / "flux.safetensors")
    return load_file(scratch / "flux.safetensors")


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
