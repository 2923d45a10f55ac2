"""LoRA files as llama.cpp's converter and others write them, from factors under ComfyUI's generic names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from text_encoder_files import add, finish

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def random_factors(shapes: Mapping[str, tuple[int, ...]], seed: int = 1, rank: int = 32) -> Factors:
    """Layer to (down [rank, in], up [out, rank]), strong enough to see."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer, (rows, columns) in shapes.items():
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        factors[layer] = (down, torch.randn(rows, rank, generator=generator) * 0.3 / rank**0.5)
    return factors


def write_adapter(
    path: Path,
    factors: Factors,
    architecture: str,
    format: str = "F32",
    alpha: float = 0.0,
    suffix: str = ".weight",
    kind: str = "lora",
) -> Path:
    """As convert_lora_to_gguf.py: general.type adapter, `<layer><suffix>.lora_a` and `.lora_b`."""
    writer: Any = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, kind)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for layer, (down, up) in factors.items():
        add(writer, f"{layer}{suffix}.lora_a", down, format)
        add(writer, f"{layer}{suffix}.lora_b", up, format)
    return finish(writer, path)


def generic_names(factors: Factors, prefix: str, alpha: float = 0.0) -> dict[str, torch.Tensor]:
    """The same LoRA as safetensors files have it; alpha 0: the product is not scaled."""
    tensors = {}
    for layer, (down, up) in factors.items():
        tensors[f"{prefix}{layer}.lora_A.weight"], tensors[f"{prefix}{layer}.lora_B.weight"] = down, up
        if alpha:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    return tensors
