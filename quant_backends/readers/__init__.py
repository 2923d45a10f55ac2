"""Readers: from a file on disk to (format, raw bytes, logical shape) per tensor."""

from __future__ import annotations

from .diffusion_gguf import LoadedTensors, load_diffusion_gguf
from .gguf_file import GGUFFile
from .gguf_tensors import TensorInfo
from .text_encoder_gguf import TextEncoderGGUF, open_text_encoder_gguf
from .text_encoder_safetensors import TextEncoderSafetensors, open_text_encoder_safetensors
from .vision_gguf import VisionGGUF, open_vision_gguf

__all__ = [
    "GGUFFile",
    "LoadedTensors",
    "TensorInfo",
    "TextEncoderGGUF",
    "TextEncoderSafetensors",
    "VisionGGUF",
    "load_diffusion_gguf",
    "open_text_encoder_gguf",
    "open_text_encoder_safetensors",
    "open_vision_gguf",
]
