"""A VAE that decodes in as large pieces as a memory budget allows.

ComfyUI's own VAE takes what the card has free, and goes over to tiles only when that was not enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ...quant_backends.memory.budget import TILE_SIZES, largest_tile
from .memory_budget_patcher import is_on_gpu

if TYPE_CHECKING:
    from comfy.sd import VAE as _Base
else:
    _Base = object

# What core's VAE Decode (Tiled) does unless it is told otherwise, in pixels and frames.
OVERLAP = 64
FRAMES = 64
FRAME_OVERLAP = 8
# Smaller tiles, in elements of the latent, are hardly more than edges.
SMALLEST_TILE = 4


class BudgetedVAE(_Base):
    """Mixin before any kind of VAE."""

    # Bytes that computing may take beside the weights.
    snug_room: float = float("inf")

    def decode(self, samples_in: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """samples_in: latents of (batch, channels, height, width), or with frames before the height; other kinds
        (audio) are decoded as they always are. Returns images, their channels last."""
        if not is_on_gpu(self.device) or not _can_be_tiled(self, samples_in.shape):
            return super().decode(samples_in, *args, **kwargs)
        whole = decoding_bytes(self, samples_in.shape)
        tiles = dict(decoding_tiles(self, samples_in.shape))
        if whole > self.snug_room and tiles:
            tile = largest_tile(tiles.__getitem__, int(self.snug_room), list(tiles))
            return self.decode_tiled(samples_in, **_tile_arguments(self, tile))
        count = max(1, int(self.snug_room // whole))  # ComfyUI's estimate is for one image
        images = [super(BudgetedVAE, self).decode(part, *args, **kwargs) for part in samples_in.split(count)]
        return images[0] if len(images) == 1 else torch.cat(images)


def with_room(vae: Any, room: int) -> Any:
    """A VAE over the same network whose decoding keeps to `room` bytes beside the weights, where tiles allow that."""
    new = copy(vae)
    if not isinstance(new, BudgetedVAE):
        new.__class__ = _budgeted_class(type(vae))
    new.snug_room = room
    return new


def decoding_bytes(vae: Any, shape: Sequence[int]) -> int:
    """ComfyUI's estimate for latents of this shape, beside the weights."""
    return int(vae.memory_used_decode(tuple(shape), vae.vae_dtype))


def decoding_tiles(vae: Any, shape: Sequence[int]) -> list[tuple[int, int]]:
    """(side in pixels, bytes of computing) of the tiles that need less than the whole, the largest first."""
    if not _can_be_tiled(vae, shape):
        return []
    sizes = [size for size in TILE_SIZES if size // vae.spacial_compression_decode() >= SMALLEST_TILE]
    whole = decoding_bytes(vae, shape)
    tiles = [(size, decoding_bytes(vae, _tile_shape(vae, shape, size))) for size in sizes]
    return [(size, nbytes) for size, nbytes in tiles if nbytes < whole]


def _can_be_tiled(vae: Any, shape: Sequence[int]) -> bool:
    return len(shape) in (4, 5) and getattr(vae, "extra_1d_channel", None) is None


def _tile_shape(vae: Any, shape: Sequence[int], size: int) -> tuple[int, ...]:
    arguments = _tile_arguments(vae, size)
    batch, channels, *frames, height, width = shape
    if arguments["tile_t"] is not None:
        frames = [min(count, arguments["tile_t"]) for count in frames]
    return (batch, channels, *frames, min(height, arguments["tile_y"]), min(width, arguments["tile_x"]))


def _tile_arguments(vae: Any, size: int) -> dict[str, int | None]:
    """For `decode_tiled`, in elements of the latent, as core's node computes them."""
    scale, frame_scale = vae.spacial_compression_decode(), vae.temporal_compression_decode()
    side = size // scale
    arguments: dict[str, int | None] = {
        "tile_x": side,
        "tile_y": side,
        "overlap": min(OVERLAP, size // 4) // scale,
        "tile_t": None,
        "overlap_t": None,
    }
    if frame_scale is not None:
        frames = max(2, FRAMES // frame_scale)
        arguments |= {"tile_t": frames, "overlap_t": max(1, min(frames // 2, FRAME_OVERLAP // frame_scale))}
    return arguments


@lru_cache
def _budgeted_class(base: type) -> type:
    return type(f"Budgeted{base.__name__}", (BudgetedVAE, base), {})
