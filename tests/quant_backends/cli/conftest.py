"""A small model in files, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from snug.quant_backends.cli import main

# What tells that it is Wan, a delicate layer, and layers that are quantized.
SHAPES = {
    "head.modulation": (1, 2, 256),
    "blocks.0.self_attn.norm_q.weight": (256,),
    "text_embedding.0.weight": (64, 256),
    **{f"blocks.{block}.ffn.0.weight": (128, 256) for block in range(3)},
    **{f"blocks.{block}.ffn.0.bias": (128,) for block in range(3)},
}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


@pytest.fixture
def model(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({f"model.diffusion_model.{name}": value for name, value in tensors.items()}, path)
    return path


@pytest.fixture
def snug(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """snug("inspect", path, …) -> (exit code, standard output, standard error)"""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run
