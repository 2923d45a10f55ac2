"""The files the demo compares: a tiny model made here (or one given), and its GGUF versions."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from native_quantizer import AVAILABLE, native_quantizer
from safetensors.torch import load_file, save_file
from snug_path import register_snug
from tiny import make_tiny_model, use_comfyui

Quantizer: TypeAlias = Callable[[torch.Tensor, str], torch.Tensor]
# What checkpoints put before the diffusion model's own tensor names.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def make_demo_model(comfyui: Path, model: Path, vae: Path, seed: int) -> None:
    """Write an SD1.5-shaped denoiser and a TAESD-shaped VAE, both with random weights."""
    use_comfyui(comfyui)
    make_tiny_model("sd15", model, seed)
    vae.parent.mkdir(parents=True, exist_ok=True)
    save_file(_random_taesd(seed), vae)


def _random_taesd(seed: int) -> dict[str, torch.Tensor]:
    """A TAESD (4 latent channels) whose untrained decoder is scaled so that its images use the visible range."""
    generator = torch.Generator().manual_seed(seed)
    autoencoder = importlib.import_module("comfy.taesd.taesd").TAESD(latent_channels=4)
    decoder = autoencoder.taesd_decoder
    last = decoder[-1]
    with torch.no_grad():
        for parameter in [*autoencoder.taesd_encoder.parameters(), *decoder.parameters()]:
            if parameter.dim() > 1:
                parameter.normal_(0.0, math.sqrt(2 / parameter[0].numel()), generator=generator)
            else:
                parameter.zero_()
        pixels = decoder(torch.randn(1, 4, 32, 32, generator=generator))
        scale = 0.2 / pixels.std(dim=(0, 2, 3))
        last.weight.mul_(scale.view(-1, 1, 1, 1))
        last.bias.copy_(0.5 - scale * pixels.mean(dim=(0, 2, 3)))
        autoencoder.vae_scale.fill_(
            0.05
        )  # the untrained denoiser ends with far larger latents than a trained one
    return autoencoder.state_dict()


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
