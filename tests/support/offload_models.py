"""Blocks in the sizes of real models, scaled down, for plans and simulated devices."""

from __future__ import annotations

import random
from collections.abc import Mapping

from snug.quant_backends.memory.plan import Block

# Bytes that stand for a MB.
MEGABYTE = 256


def _uneven(sizes: list[int], by: float) -> list[int]:
    """As files that mix formats have them: some blocks in more bits than others."""
    rng = random.Random(0)
    return [round(size * rng.uniform(1 - by, 1 + by)) for size in sizes]


FLUX = [340] * 19 + [141] * 38
# In MB.
MODELS: Mapping[str, list[int]] = {
    "flux": FLUX,
    "flux, mixed formats": _uneven(FLUX, 0.15),
    "20 equal": [300] * 20,
    "33 equal": [300] * 33,
    "60 equal": [330] * 60,
    "30 uneven": _uneven([300] * 30, 0.3),
    "three kinds": [400] * 8 + [200] * 8 + [300] * 8,
    "alternating": [300, 150] * 20,
}


def blocks_of(model: str, seconds: float = 0.0, tensors: int = 4) -> list[Block]:
    """Its blocks, each of several tensors; computing takes `seconds` in all, by block as its bytes."""
    sizes = MODELS[model]
    return [
        Block(f"blocks.{index}", (size * MEGABYTE // tensors + index,) * tensors, seconds * size / sum(sizes))
        for index, size in enumerate(sizes)
    ]
