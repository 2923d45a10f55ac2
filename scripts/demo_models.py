"""The files the demo compares: a tiny model made here (or one given), and its GGUF versions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from native_quantizer import AVAILABLE, native_quantizer
from safetensors.torch import load_file
from snug_path import register_snug
from tiny import make_tiny_model, make_tiny_vae, use_comfyui

Quantizer: TypeAlias = Callable[[torch.Tensor, str], torch.Tensor]
# What checkpoints put before the diffusion model's own tensor names.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def make_demo_model(comfyui: Path, model: Path, vae_folder: Path, seed: int) -> str:
    """Write an SD1.5-shaped denoiser and a TAESD-shaped VAE, both with random weights; returns the VAE's name."""
    use_comfyui(comfyui)
    make_tiny_model("sd15", model, seed)
    make_tiny_vae(vae_folder, "taesd", seed)
    return "taesd"


def write_gguf_versions(model: Path, folder: Path) -> dict[str, Path]:
    """Write ``model`` (safetensors) as GGUF in each format of the demo; returns the files by format name."""
    register_snug()
    writers = importlib.import_module("snug.quant_backends.writers")
    tensors = _without_prefix(load_file(model))
    files = {}
    for name, quantizer in _quantizers().items():
        path = folder / f"{model.stem}-{name}.gguf"
        writers.write_gguf(path, tensors, name, quantizer=quantizer)
        files[name] = path
    return files


def _quantizers() -> dict[str, Quantizer | None]:
    """The demo's formats and what encodes each (None: Snug itself)."""
    if AVAILABLE:
        return {"F16": None, "Q8_0": native_quantizer, "Q4_K": native_quantizer}
    gguf = importlib.import_module("gguf")

    def reference(values: torch.Tensor, name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name]))

    return {"F16": None, "Q8_0": reference, "Q4_0": reference}


def _without_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in PREFIXES:
        inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if inside:
            return inside
    return dict(tensors)
