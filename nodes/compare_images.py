"""Compare Images (Snug): pictures of several models beside one another, to look at and in numbers."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from comfy_api.latest import io, ui

from .adapter.progress import progress_of
from .measure.comparison import Comparison, as_json, compare, comparison_data, gather, report_text, score_text
from .measure.contact_sheet import Cell, contact_sheet
from .measure.perceptual import find_lpips

INPUTS = 8
# Each is about as large as its images together.
MOST_SHEETS = 64
# Quickly written: the pictures are shown by a browser on the same machine or near it.
COMPRESSION = 1


class SnugCompareImages(io.ComfyNode):
    """The page shows what is measured here; pictures go to it as ComfyUI's temporary previews."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        images = [
            io.Image.Input(
                f"image_{number}",
                optional=number > 1,
                tooltip=(
                    "What the others are compared with. If it is the only one connected, the images of its batch are "
                    "compared with one another."
                    if number == 1
                    else f"Image or batch number {number}. Images of batches are compared place by place."
                ),
            )
            for number in range(1, INPUTS + 1)
        ]
        return io.Schema(
            node_id="SnugCompareImages",
            display_name="Compare Images (Snug)",
            category="Snug/compare",
            description=(
                "Shows images of several models beside one another, under a slider, blinking or as a map of their "
                "differences, zoomed and moved together; with PSNR and SSIM against the first. Gives a contact sheet "
                "with captions, a report and JSON."
            ),
            is_output_node=True,
            inputs=[
                *images,
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=(
                        "A line for each image, in their order: format, seconds, peak memory or whatever tells them "
                        "apart. May come from another node."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip=(
                        "The images with captions and numbers on one sheet; a sheet for each place of a batch, at "
                        "most 64."
                    ),
                ),
                io.String.Output(display_name="report", tooltip="PSNR and SSIM of each image as text."),
                io.String.Output(
                    display_name="json", tooltip="The same as JSON, for each image of the batches."
                ),
            ],
        )

    @classmethod
    def execute(cls, image_1: torch.Tensor, captions: str = "", **others: torch.Tensor) -> io.NodeOutput:
        batches = [image_1, *(others.get(f"image_{number}") for number in range(2, INPUTS + 1))]
        series, count, notes = gather(batches, captions)
        distance, reason = find_lpips()
        step = progress_of(len(series) * (count + 1))
        found = compare(series, count, [*notes, *([reason] if reason else [])], distance, step)
        sheets = []
        for index in range(min(count, MOST_SHEETS)):
            sheets.append(contact_sheet(_cells(found, index)))
            step()
        report = report_text(found)
        shown = comparison_data(found)
        name = f"snug_compare_{secrets.token_hex(4)}"
        for number, (picture, one) in enumerate(zip(shown["pictures"], found.series, strict=True)):
            picture["files"] = ui.ImageSaveHelper.save_images(
                one.images[:count], f"{name}_{number + 1}", io.FolderType.temp, None, COMPRESSION
            )
            step()
        return io.NodeOutput(
            torch.cat(sheets), report, as_json(found), ui={"text": (report,), "snug_compare": (shown,)}
        )


def _cells(found: Comparison, index: int) -> list[Cell]:
    details: list[Any] = [
        score_text(scores[index]) if scores else ("reference" if number == 0 else "another size")
        for number, scores in enumerate(found.scores)
    ]
    return [
        Cell(one.at(index), one.caption, detail) for one, detail in zip(found.series, details, strict=True)
    ]
