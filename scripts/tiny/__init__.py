"""Tiny real models for tests and the demo; `scripts/tiny_models.py` is the command line."""

from __future__ import annotations

from .build import make_tiny_model, use_comfyui
from .families import FAMILIES, Family
from .lora import make_tiny_lora
from .vae import TINY_VAES, make_tiny_vae

__all__ = [
    "FAMILIES",
    "TINY_VAES",
    "Family",
    "make_tiny_lora",
    "make_tiny_model",
    "make_tiny_vae",
    "use_comfyui",
]
