"""A VAE that decodes and encodes in as large pieces as a memory budget allows.

ComfyUI's own VAE takes what the card has free, and goes over to tiles only when that was not enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ...quant_backends.memory.budget import TILE_SIZES, largest_tile
from .memory_budget_patcher import is_on_gpu

if TYPE_CHECKING:
    from comfy.sd import VAE as _Base
else:
    _Base = object

# What core's nodes for tiles do unless they are told otherwise, in pixels and frames.
OVERLAP = 64
FRAMES = 64
FRAME_OVERLAP = 8
# Smaller tiles, in elements of the latent, are hardly more than edges.
SMALLEST_TILE = 4


@dataclass(frozen=True, slots=True)
class Coding:
    """Decoding or encoding at once what has this shape: latents or pixels of (batch, channels, height, width), or
    with frames before the height."""

    vae: Any
    shape: tuple[int, ...]
    is_decoding: bool = True

    @property
    def can_be_tiled(self) -> bool:
        """Sound cannot."""
        dimensions = self.vae.latent_dim
        return (
            dimensions in (2, 3) and len(self.shape) == 2 + dimensions and self.vae.extra_1d_channel is None
        )

    @property
    def nbytes(self) -> int:
        """ComfyUI's estimate of what it takes beside the weights. It is for one image, however many there are."""
        return self._estimate(self.shape)

    def tiles(self) -> list[tuple[int, int]]:
        """(side in pixels, bytes beside the weights) of the tiles that need less than the whole, the largest first."""
        if not self.can_be_tiled:
            return []
        scale = self.vae.spacial_compression_decode()
        sizes = [size for size in TILE_SIZES if size // scale >= SMALLEST_TILE]
        tiles = [(size, self._estimate(self._tile_shape(size))) for size in sizes]
        return [(size, nbytes) for size, nbytes in tiles if nbytes < self.nbytes]

    def tile_for(self, room: float) -> int | None:
        """The side in pixels of the largest tiles that `room` bytes allow; None where none are needed or possible."""
        tiles = dict(self.tiles())
        if self.nbytes <= room or not tiles:
            return None
        return largest_tile(tiles.__getitem__, int(room), list(tiles))

    def arguments(self, size: int) -> dict[str, int | None]:
        """For `decode_tiled` or `encode_tiled`, as core's nodes compute them."""
        scale = self.vae.spacial_compression_decode() if self.is_decoding else 1
        side = size // scale
        tile: dict[str, int | None] = {
            "tile_x": side,
            "tile_y": side,
            "overlap": min(OVERLAP, size // 4) // scale,
        }
        frame_scale = self.vae.temporal_compression_decode()
        if frame_scale is None:
            return {**tile, "tile_t": None, "overlap_t": None}
        frame_scale = frame_scale if self.is_decoding else 1
        frames = max(2, FRAMES // frame_scale)
        return {**tile, "tile_t": frames, "overlap_t": max(1, min(frames // 2, FRAME_OVERLAP // frame_scale))}

    def _tile_shape(self, size: int) -> tuple[int, ...]:
        batch, channels, *frames, height, width = self.shape
        arguments = self.arguments(size)
        sides = (min(height, arguments["tile_y"] or height), min(width, arguments["tile_x"] or width))
        return (batch, channels, *(min(count, arguments["tile_t"] or count) for count in frames), *sides)

    def _estimate(self, shape: tuple[int, ...]) -> int:
        estimate = self.vae.memory_used_decode if self.is_decoding else self.vae.memory_used_encode
        return int(estimate(shape, self.vae.vae_dtype))


class BudgetedVAE(_Base):
    """Mixin before any kind of VAE."""

    # Bytes that computing may take beside the weights.
    snug_room: float = float("inf")

    def decode(self, samples_in: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """samples_in: latents. Returns pixels, their channels last, as ComfyUI's VAE does."""
        if is_picture_as_video(self, samples_in.shape):
            samples_in = samples_in[:, :, 0]  # as newer ComfyUI does
        coding = Coding(self, tuple(samples_in.shape))
        if not is_on_gpu(self.device) or not coding.can_be_tiled:
            return super().decode(samples_in, *args, **kwargs)
        tile = coding.tile_for(self.snug_room)
        if tile is not None:
            return self.decode_tiled(samples_in, **coding.arguments(tile))
        decode = super().decode
        return _joined([decode(part, *args, **kwargs) for part in self._parts(samples_in, coding)])

    def encode(self, pixel_samples: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """pixel_samples: pixels, their channels last. Returns latents."""
        coding = Coding(self, _shape_of_pixels(self, pixel_samples.shape), is_decoding=False)
        if not is_on_gpu(self.device) or not coding.can_be_tiled:
            return super().encode(pixel_samples, *args, **kwargs)
        tile = coding.tile_for(self.snug_room)
        if tile is not None:
            return self.encode_tiled(pixel_samples, **coding.arguments(tile))
        encode = super().encode
        return _joined([encode(part, *args, **kwargs) for part in self._parts(pixel_samples, coding)])

    def _parts(self, samples: torch.Tensor, coding: Coding) -> Sequence[torch.Tensor]:
        """As many images at once as there is room for."""
        is_batch = len(samples) == coding.shape[0]  # not the frames of a video
        return samples.split(max(1, int(self.snug_room // coding.nbytes))) if is_batch else [samples]


def with_room(vae: Any, room: int) -> Any:
    """A VAE over the same network whose computing keeps to `room` bytes beside the weights, where tiles allow that."""
    new = copy(vae)
    if not isinstance(new, BudgetedVAE):
        new.__class__ = _budgeted_class(type(vae))
    new.snug_room = room
    return new


def is_picture_as_video(vae: Any, shape: Sequence[int]) -> bool:
    """Whether latents have a dimension for frames that the VAE does not know."""
    return vae.latent_dim == 2 and len(shape) == 5


def _shape_of_pixels(vae: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """As core's `encode` rearranges them: channels first, and images that become the frames of a video."""
    first, *rest, channels = shape
    if vae.latent_dim != 3 or len(shape) != 4:
        return (first, channels, *rest)
    return (first, channels, 1, *rest) if vae.not_video else (1, channels, first, *rest)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache
def _budgeted_class(base: type) -> type:
    return type(f"Budgeted{base.__name__}", (BudgetedVAE, base), {})
