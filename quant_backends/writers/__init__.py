"""Writers of model files."""

from __future__ import annotations

from .architecture import detect_architecture
from .gguf_file import write_gguf

__all__ = ["detect_architecture", "write_gguf"]
