"""Writers of model files."""

from __future__ import annotations

from .architecture import detect_architecture
from .conventions import CONVENTIONS, convention_for
from .gguf_file import write_gguf
from .safetensors_file import write_safetensors
from .text_encoder_gguf import text_encoder_architecture, write_text_encoder_gguf
from .tokenizers import tokenizer_metadata

__all__ = [
    "CONVENTIONS",
    "convention_for",
    "detect_architecture",
    "text_encoder_architecture",
    "tokenizer_metadata",
    "write_gguf",
    "write_safetensors",
    "write_text_encoder_gguf",
]
