"""The digits of scikit-learn, and the latents that stand for them."""

from __future__ import annotations

import numpy
import torch
from sklearn.datasets import load_digits

# Channels, frames, height and width of one latent: Wan's channels, a cell for each pixel of a digit.
LATENT = (16, 1, 8, 8)
# A pixel is this far from 0 in every channel, black below and white above.
AMPLITUDE = 2.0


def real_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1797 of them: pixels float32 [1797, 8, 8] from 0 (ground) to 1 (ink), classes int64 [1797]."""
    values, classes = load_digits(return_X_y=True)
    pixels = torch.from_numpy(numpy.asarray(values, dtype=numpy.float32)) / 16
    return pixels.view(-1, 8, 8), torch.from_numpy(numpy.asarray(classes, dtype=numpy.int64))


def latents(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [N, 8, 8] from 0 to 1 to a VAE's latents [N, 16, 1, 8, 8], all channels alike."""
    return (AMPLITUDE * (2 * pixels - 1)).view(-1, 1, 1, 8, 8).expand(-1, *LATENT)
