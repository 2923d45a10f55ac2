"""The pairs of a blind test: which pictures can be told apart at all, and under names that tell nothing."""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Callable, Sequence

import torch

from ...quant_backends.core.errors import SnugError
from .blind_rounds import File

# Saves some pictures in ComfyUI's temporary folder and returns how the page asks for each.
Save = Callable[[torch.Tensor, str], Sequence[File]]


def pairs_of(
    reference: torch.Tensor, quantized: torch.Tensor
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], str, list[str]]:
    """Pairs that differ, a text that follows from their pixels, and sentences about those that were left out.

    reference, quantized: IMAGE batches of one size, [N, H, W, C] from 0 to 1. Pictures of the pairs are uint8.
    Raises SnugError where sizes or counts differ, and where no pair differs.
    """
    if reference.ndim != 4 or quantized.ndim != 4 or 0 in reference.shape or 0 in quantized.shape:
        raise SnugError("reference and quantized must be images: one of them is empty.")
    if reference.shape[1:3] != quantized.shape[1:3]:
        sizes = [f"{batch.shape[2]} × {batch.shape[1]}" for batch in (reference, quantized)]
        raise SnugError(
            f"reference is {sizes[0]} pixels and quantized {sizes[1]}: their size would give them away. Make both of "
            "one size."
        )
    if len(reference) != len(quantized):
        raise SnugError(
            f"reference has {len(reference)} images and quantized {len(quantized)}: each needs its partner. Make both "
            "with the same prompts and seeds, in the same order."
        )
    pairs = [
        (first, second)
        for first, second in zip(_bytes(reference), _bytes(quantized), strict=True)
        if not first.equal(second)
    ]
    equal = len(reference) - len(pairs)
    if not pairs:
        raise SnugError(
            "All pairs are equal in every pixel, so there is nothing to find. Is the same model connected twice?"
        )
    digest = hashlib.sha256()
    for pair in pairs:
        for picture in pair:
            digest.update(picture.numpy().tobytes())
    notes = [f"{equal} of {len(reference)} pairs are equal in every pixel and left out."] if equal else []
    return pairs, digest.hexdigest(), notes


def save_pairs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], save: Save) -> list[tuple[File, File]]:
    """Each picture under a name drawn at random, in an order drawn at random: neither names nor times tell its kind."""
    places = [(number, side) for number in range(len(pairs)) for side in (0, 1)]
    random.SystemRandom().shuffle(places)
    files: dict[tuple[int, int], File] = {}
    for number, side in places:
        (file,) = save(pairs[number][side][None], f"snug_blind_{secrets.token_hex(8)}")
        files[number, side] = file
    return [(files[number, 0], files[number, 1]) for number in range(len(pairs))]


def _bytes(batch: torch.Tensor) -> torch.Tensor:
    """[N, H, W, 3] uint8, rounded down as ComfyUI saves pictures."""
    images = batch[..., :3].detach().to("cpu", torch.float32).nan_to_num(0.0, 0.0, 0.0)
    if images.shape[-1] < 3:
        images = images[..., :1].expand(*images.shape[:-1], 3)
    return (images.clamp(0, 1) * 255).to(torch.uint8).contiguous()
