"""Blind Test (Snug): can people tell the quantized model's images from the original's?"""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from .adapter.progress import progress_of
from .measure.blind_pairs import pairs_of, save_pairs
from .measure.blind_routes import MOST_TRIALS, rounds

COMPRESSION = 1
DEFAULT_NAME = "the quantized model"


class SnugBlindTest(io.ComfyNode):
    """The page shows pairs and sends votes to `measure.blind_routes`, which knows which is which."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SnugBlindTest",
            display_name="Blind Test (Snug)",
            category="Snug/compare",
            description=(
                "Shows pairs of images in shuffled order and asks which one is of the quantized model. Keeps the votes "
                "and says how often you found it, and how often guessing would do as well."
            ),
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "reference",
                    tooltip="Images of the original model: several, for different prompts or seeds.",
                ),
                io.Image.Input(
                    "quantized",
                    tooltip="Images of the quantized model, with the same prompts and seeds in the same order.",
                ),
                io.String.Input(
                    "name",
                    default=DEFAULT_NAME,
                    tooltip="What is tested, such as Q4_K; the result calls it so.",
                ),
                io.Int.Input(
                    "trials",
                    default=20,
                    min=1,
                    max=MOST_TRIALS,
                    tooltip=(
                        "How many pairs are shown in a round; those connected come again until there are enough. "
                        "Fewer than 5 can never show anything, 20 are a good start."
                    ),
                ),
                io.Int.Input(
                    "round",
                    default=1,
                    min=1,
                    max=2**31 - 1,
                    tooltip=(
                        "The order of the pairs follows from it and from the images. Another number begins a new round."
                    ),
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(
        cls, reference: torch.Tensor, quantized: torch.Tensor, name: str, trials: int, round: int
    ) -> io.NodeOutput:
        pairs, digest, notes = pairs_of(reference, quantized)
        step = progress_of(2 * len(pairs))

        def save(images: torch.Tensor, prefix: str) -> list[dict[str, str]]:
            # Half a step more than the byte, so that rounding down gives the byte again.
            values = (images.float() + 0.5) / 255
            files = ui.ImageSaveHelper.save_images(values, prefix, io.FolderType.temp, None, COMPRESSION)
            step()
            return [dict(file) for file in files]

        height, width = pairs[0][0].shape[:2]
        shown = rounds().begin(
            " ".join(name.split()) or DEFAULT_NAME,
            f"{round} {digest}",
            save_pairs(pairs, save),
            (width, height),
            trials,
        )
        return io.NodeOutput(ui={"snug_blind": ({**shown, "notes": notes},)})
