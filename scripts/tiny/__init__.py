"""Tiny real models for tests and the demo; `scripts/tiny_models.py` is the command line."""

from __future__ import annotations

from .build import make_tiny_model, use_comfyui
from .families import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "make_tiny_model", "use_comfyui"]
