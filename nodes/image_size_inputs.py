"""Inputs that several nodes share: the size of the image that a node plans for."""

from __future__ import annotations

from comfy_api.latest import io

SMALLEST_IMAGE, USUAL_IMAGE, LARGEST_IMAGE = 16, 1024, 16384
LARGEST_BATCH = 4096


def image_size_inputs(ending: str) -> list[io.Input]:
    """width, height and batch_size; ending: of their tooltips, what the size is for or when it counts."""
    sides = [
        io.Int.Input(
            name,
            default=USUAL_IMAGE,
            min=SMALLEST_IMAGE,
            max=LARGEST_IMAGE,
            step=8,
            tooltip=f"The {name} of the image in pixels{ending}",
        )
        for name in ("width", "height")
    ]
    batch = io.Int.Input(
        "batch_size", default=1, min=1, max=LARGEST_BATCH, tooltip=f"How many images are made at once{ending}"
    )
    return [*sides, batch]
