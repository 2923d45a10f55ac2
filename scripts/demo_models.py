"""The files the demo compares: a tiny model that draws digits (or one given), and its GGUF versions."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from digits import WEIGHTS, make_digits_text_encoder, make_digits_vae
from native_quantizer import AVAILABLE, native_quantizer
from safetensors.torch import load_file
from snug_path import register_snug
from tiny import use_comfyui

FORMATS = ("F16", "Q8_0", "Q4_K", "Q2_K")
# What checkpoints put before the diffusion model's own tensor names.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def make_demo_model(comfyui: Path, model: Path, vae: Path, text_encoder: Path) -> None:
    """Write the model that draws digits, its VAE and its text encoder."""
    use_comfyui(comfyui)
    model.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(WEIGHTS, model)
    make_digits_vae(vae)
    make_digits_text_encoder(text_encoder)


def write_gguf_versions(model: Path, folder: Path) -> dict[str, Path]:
    """Write ``model`` (safetensors) as GGUF in each format of the demo; returns the files by format name."""
    register_snug()
    writers = importlib.import_module("snug.quant_backends.writers")
    tensors = _without_prefix(load_file(model))
    files = {}
    for name in FORMATS:
        path = folder / f"{model.stem}-{name}.gguf"
        # Native code is faster where there is some; the bytes of Snug's own encoders are as good.
        quantizer = native_quantizer if AVAILABLE and name != "F16" else None
        writers.write_gguf(path, tensors, name, quantizer=quantizer)
        files[name] = path
    return files


def _without_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in PREFIXES:
        inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if inside:
            return inside
    return dict(tensors)
