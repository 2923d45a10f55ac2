"""One weight as it is stored, wherever: what summaries are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..readers.safetensors_file import DTYPES

# What safetensors and ggml call torch's dtypes.
PLAIN_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """name: the model's. format: as Snug calls it, of a plain tensor as safetensors does. shape: the logical one in
    torch order, None where it is not known. weights: their number. nbytes: stored, scales included. dtype: of a plain
    tensor, None for a quantized one.
    """

    name: str
    format: str
    shape: tuple[int, ...] | None
    weights: int
    nbytes: int
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> float:
        """Per weight."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


def plain(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> StoredWeight:
    """A tensor that is not quantized."""
    weights = math.prod(shape)
    format = PLAIN_NAMES.get(dtype, str(dtype).removeprefix("torch."))
    return StoredWeight(name, format, shape, weights, weights * dtype.itemsize, dtype)


@dataclass(frozen=True, slots=True)
class FileContents:
    """What the header of a file says.

    container: "GGUF version 3", SINGLE_FILE or FOLDER. kind: what sort of model it is, for people. convention: how it
    is quantized, as `readers.conventions` calls it ("GGUF" for GGUF files). weights: of the diffusion model where there
    is one, else of all. companions: of the text encoders, VAE and the like beside it. header_bytes: None for a folder.
    """

    path: str
    container: str
    kind: str
    convention: str
    weights: tuple[StoredWeight, ...]
    companions: tuple[StoredWeight, ...]
    metadata: Mapping[str, Any]
    file_bytes: int
    header_bytes: int | None

    @property
    def is_diffusion_model(self) -> bool:
        return self.kind in (DIFFUSION_MODEL, CHECKPOINT)


# Containers of safetensors, and kinds.
SINGLE_FILE, FOLDER = "safetensors", "diffusers folder"
DIFFUSION_MODEL, CHECKPOINT = "diffusion model", "checkpoint"
