"""A tiny diffusion model that draws handwritten digits: how it is made, prompted, decoded and judged.

The architecture is Wan's (text to video, one frame), as ComfyUI detects it from a file, 3.8 million weights wide
enough for K-quants; `scripts/train_digits.py` trains it on scikit-learn's digits.
"""

from __future__ import annotations

from pathlib import Path

from .data import LATENT, latents, real_digits
from .judge import Judge
from .prompts import CLASSES, prompts
from .text_encoder import TEXT_ENCODER_TYPE, make_digits_text_encoder
from .vae import PICTURE, make_digits_vae

# The trained model, float16.
WEIGHTS = Path(__file__).resolve().parents[2] / "tests" / "assets" / "digits-wan.safetensors"

__all__ = [
    "CLASSES",
    "LATENT",
    "PICTURE",
    "TEXT_ENCODER_TYPE",
    "WEIGHTS",
    "Judge",
    "latents",
    "make_digits_text_encoder",
    "make_digits_vae",
    "prompts",
    "real_digits",
]
