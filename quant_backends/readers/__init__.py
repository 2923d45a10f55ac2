"""Readers: from a file on disk to (format, raw bytes, logical shape) per tensor."""

from __future__ import annotations

from .diffusion_gguf import LoadedTensors, load_diffusion_gguf
from .gguf_file import GGUFFile
from .gguf_tensors import TensorInfo

__all__ = ["GGUFFile", "LoadedTensors", "TensorInfo", "load_diffusion_gguf"]
