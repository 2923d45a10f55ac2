"""What sampling takes beside the weights, as ComfyUI estimates it, for an image that is not there yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management as management

# Pixels per latent of nearly all VAEs, where neither ComfyUI nor a VAE says.
USUAL_SCALE = 8


@dataclass(frozen=True, slots=True)
class ImageSize:
    """In pixels, and how many at once."""

    width: int
    height: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.width} × {self.height}, batch of {self.batch_size}"


def latent_shape(form: Any, size: ImageSize, scale: int | None = None) -> tuple[int, ...] | None:
    """Of the latent of a picture, for a video model of one frame; None for what width and height do not describe.

    form: ComfyUI's latent format of the model. scale: pixels per latent where the format does not say.
    """
    if form.latent_dimensions not in (2, 3):
        return None
    # 0.3.75 does not know the ratio.
    pixels: int = getattr(form, "spacial_downscale_ratio", None) or scale or USUAL_SCALE
    frames = [1] * (form.latent_dimensions - 2)
    return (
        size.batch_size,
        form.latent_channels,
        *frames,
        -(-size.height // pixels),
        -(-size.width // pixels),
    )


def sampling_estimate(model: Any, shape: tuple[int, ...]) -> float:
    """Bytes, by ComfyUI's own estimate: with the positive and the negative prompt in one batch."""
    return model.memory_required([2 * shape[0], *shape[1:]])


def computing_bytes(estimate: float) -> int:
    """Bytes to plan with: ComfyUI never keeps less than that free."""
    return int(max(estimate, management.minimum_inference_memory() - management.extra_reserved_memory()))
