"""Tiny autoencoders in TAESD's layout, which ComfyUI's own VAELoader loads by the names of their files."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from .weights import random_parameter

# Latent channels by the name that VAELoader lists once models/vae_approx holds both files of the pair.
TINY_VAES = {"taesd": 4, "taesdxl": 4, "taesd3": 16, "taef1": 16}

_LAST_LAYER_GAIN = 0.2  # of the decoder: its output, an image in 0..1, then neither saturates nor is flat


def make_tiny_vae(folder: str | os.PathLike[str], name: str, seed: int = 0) -> list[Path]:
    """Writes `<name>_encoder.safetensors` and `<name>_decoder.safetensors` (float16) into `folder`.

    Needs ComfyUI on `sys.path` (see `use_comfyui`). Raises KeyError for a name that is not in TINY_VAES.
    """
    taesd = importlib.import_module("comfy.taesd.taesd")
    channels = TINY_VAES[name]
    Path(folder).mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    paths = []
    for part in ("encoder", "decoder"):
        with torch.device("meta"):
            layers = getattr(taesd, part.capitalize())(latent_channels=channels)
        tensors = {
            key: random_parameter(key, shape.shape, generator) for key, shape in layers.state_dict().items()
        }
        if part == "decoder":
            last = len(layers) - 1
            tensors[f"{last}.weight"] *= _LAST_LAYER_GAIN
            tensors[f"{last}.bias"] += 0.5
        path = Path(folder) / f"{name}_{part}.safetensors"
        save_file({key: tensor.half() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
        paths.append(path)
    return paths
