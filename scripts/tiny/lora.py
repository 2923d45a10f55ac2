"""A LoRA for a tiny model, strong enough that its presence, strength and sign show in the samples."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Matrices inside numbered blocks: what LoRAs are trained for, and what keeps its name in every family.
_IN_BLOCK = re.compile(r"(blocks|layers|refiner)\.\d+\..*\.weight$")
_ALPHA_PER_RANK = 0.5  # unlike 1, it shows a loader that ignores alpha


def make_tiny_lora(
    model_path: str | os.PathLike[str],
    path: str | os.PathLike[str],
    rank: int = 8,
    seed: int = 0,
    keys: Collection[str] | None = None,
    effect: float = 0.5,
) -> list[str]:
    """Writes a LoRA for the dense model `model_path` to the safetensors file `path`.

    Each matrix W [out, in] named X.weight gets diffusion_model.X.lora_A.weight [rank, in], .lora_B.weight
    [out, rank] and .alpha; at strength 1 the product's standard deviation is `effect` times that of a tiny
    model's W. keys: names of the weights to change; None takes all matrices in numbered blocks. Returns the
    names.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    changed = []
    with safe_open(os.fspath(model_path), "pt") as model:
        for name in sorted(model.keys()):
            shape = model.get_slice(name).get_shape()
            if len(shape) != 2 or not (_IN_BLOCK.search(name) if keys is None else name in keys):
                continue
            rows, columns = shape
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            down = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            up = torch.randn(rows, rank, generator=generator) * effect / (_ALPHA_PER_RANK * math.sqrt(rank))
            tensors[f"{layer}.lora_A.weight"] = down.half()
            tensors[f"{layer}.lora_B.weight"] = up.half()
            tensors[f"{layer}.alpha"] = torch.tensor(_ALPHA_PER_RANK * rank)
            changed.append(name)
    save_file(tensors, os.fspath(path), metadata={"format": "pt"})
    return changed
