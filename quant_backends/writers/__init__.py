"""Writers of model files."""

from __future__ import annotations

from .architecture import detect_architecture
from .conventions import CONVENTIONS, convention_for
from .gguf_file import write_gguf
from .safetensors_file import write_safetensors
from .sentencepiece_metadata import sentencepiece_metadata
from .text_encoder_gguf import text_encoder_architecture, write_text_encoder_gguf

__all__ = [
    "CONVENTIONS",
    "convention_for",
    "detect_architecture",
    "sentencepiece_metadata",
    "text_encoder_architecture",
    "write_gguf",
    "write_safetensors",
    "write_text_encoder_gguf",
]
