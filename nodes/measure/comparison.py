"""Pictures beside one another: which belong together, how near each is to the first, and that as text and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...quant_backends.core.errors import SnugError
from .image_metrics import WINDOW, psnr, ssim
from .perceptual import Distance

# So many fit beside one another on a page and on a contact sheet.
MOST_PICTURES = 16
# Each is a file and a step in the page.
MOST_PLACES = 256


@dataclass(frozen=True, slots=True)
class Series:
    """One side of a comparison: a picture for each place in the batch, or one that stands for all of them.

    images: [N, H, W, 3], float32 from 0 to 1.
    """

    caption: str
    images: torch.Tensor

    @property
    def size(self) -> str:
        return f"{self.images.shape[2]} × {self.images.shape[1]}"

    def at(self, index: int) -> torch.Tensor:
        """[H, W, 3]"""
        return self.images[min(index, len(self.images) - 1)]


@dataclass(frozen=True, slots=True)
class Score:
    """How near one picture is to the first series' picture at the same place.

    psnr: dB, inf where they are equal. ssim: None for pictures smaller than its window. lpips: None where it is not
    available.
    """

    psnr: float
    ssim: float | None
    lpips: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """series: the first is what the others are compared with. count: of places in the batch.

    scores: for each series one for each place; none for the first, and for those of another size.
    notes: sentences about what could not be done as asked.
    """

    series: tuple[Series, ...]
    count: int
    scores: tuple[tuple[Score, ...], ...]
    notes: tuple[str, ...]


def gather(batches: Sequence[torch.Tensor | None], captions: str) -> tuple[list[Series], int, list[str]]:
    """The series, how many places of the batch are compared, and notes.

    batches: IMAGE tensors [N, H, W, C], None where nothing is connected. A single one is taken apart: its images are
    compared with one another. captions: a line for each image in their order.
    Raises SnugError for fewer than two images and for too many.
    """
    given = [(number, batch) for number, batch in enumerate(batches, 1) if batch is not None]
    lines = [line.strip() for line in captions.splitlines()]
    if len(given) == 1:
        images = given[0][1]
        if len(images) < 2:
            raise SnugError(
                "Only one image is connected, and a comparison needs two: connect another one, or a batch of several."
            )
        if len(images) > MOST_PICTURES:
            raise SnugError(
                f"The batch has {len(images)} images, and {MOST_PICTURES} at most can be compared side by side. To "
                "step through batches, connect each to an input of its own."
            )
        given = [(number, images[number - 1 : number]) for number in range(1, len(images) + 1)]
    notes: list[str] = []
    # The line of an input is the one with its number, also where inputs before it are empty.
    series = [
        Series(_line(lines, number) or f"Image {number}", _clean(batch, number, notes))
        for number, batch in given
    ]
    lengths = sorted({len(one.images) for one in series if len(one.images) > 1})
    count = lengths[0] if lengths else 1
    if len(lengths) > 1:
        found = " and ".join(map(str, lengths))
        notes.append(f"The batches have {found} images: only the first {count} of each are compared.")
    if count > MOST_PLACES:
        count = MOST_PLACES
        notes.append(f"Only the first {count} images of each batch are compared.")
    return series, count, notes


def compare(
    series: Sequence[Series],
    count: int,
    notes: Sequence[str],
    distance: Distance | None,
    step: Callable[[], None] = lambda: None,
) -> Comparison:
    """Measures every picture against the first one. step: called after each."""
    first = series[0]
    notes = list(notes)
    scores: list[tuple[Score, ...]] = [()]
    for number, one in enumerate(series[1:], 2):
        if one.images.shape[1:] != first.images.shape[1:]:
            notes.append(
                f"Image {number} ({one.caption}) is {one.size} pixels and the first {first.size}: numbers and the "
                "difference need the same size, so they are left out."
            )
            scores.append(())
            continue
        found = []
        for index in range(count):
            found.append(_score(first.at(index)[None], one.at(index)[None], distance))
            step()
        scores.append(tuple(found))
    if min(first.images.shape[1:3]) < WINDOW:
        notes.append(
            f"SSIM is left out: it needs at least {WINDOW} × {WINDOW} pixels, the first image has {first.size}."
        )
    return Comparison(tuple(series), count, tuple(scores), tuple(notes))


def _score(a: torch.Tensor, b: torch.Tensor, distance: Distance | None) -> Score:
    near = float(ssim(a, b)) if min(a.shape[1:3]) >= WINDOW else None
    return Score(float(psnr(a, b)), near, None if distance is None else distance(a, b))


def _line(lines: Sequence[str], number: int) -> str:
    return lines[number - 1] if number <= len(lines) else ""


def _clean(batch: torch.Tensor, number: int, notes: list[str]) -> torch.Tensor:
    """Three channels from 0 to 1 on the CPU. Transparency is left out, as ComfyUI's own previews of IMAGE do."""
    if batch.ndim != 4 or 0 in batch.shape:
        raise SnugError(
            f"image_{number} is no batch of images: its shape is {tuple(batch.shape)}, expected "
            "[images, height, width, 3]."
        )
    images = batch[..., :3].detach().to("cpu", torch.float32)
    if images.shape[-1] < 3:
        images = images[..., :1].expand(*images.shape[:-1], 3)
    if not bool(torch.isfinite(images).all()):
        notes.append(
            f"Image {number} has pixels that are no numbers (NaN or infinite); they are shown black."
        )
        images = images.nan_to_num(0.0, 0.0, 0.0)
    return images.clamp(0, 1)


def score_text(score: Score) -> str:
    """Such as "PSNR 31.20 dB, SSIM 0.9512"."""
    if math.isinf(score.psnr):
        return "identical"
    parts = [f"PSNR {score.psnr:.2f} dB"]
    if score.ssim is not None:
        parts.append(f"SSIM {score.ssim:.4f}")
    if score.lpips is not None:
        parts.append(f"LPIPS {score.lpips:.4f}")
    return ", ".join(parts)


def report_text(found: Comparison) -> str:
    """For people: a line for each picture, then what is to be known about them."""
    first = found.series[0]
    lines = [f"1. {first.caption} ({first.size}): what the others are compared with"]
    for number, (one, scores) in enumerate(zip(found.series[1:], found.scores[1:], strict=True), 2):
        lines.append(f"{number}. {one.caption} ({one.size}): {_summary(scores)}")
    if found.count > 1:
        lines.append(
            f"Numbers are means over {found.count} images; those of the farthest one are in brackets."
        )
    return "\n".join([*lines, *found.notes])


def _summary(scores: Sequence[Score]) -> str:
    if not scores:
        return "another size"
    if len(scores) == 1:
        return score_text(scores[0])
    different = [score for score in scores if not math.isinf(score.psnr)]
    if not different:
        return "identical"
    text = f"{score_text(mean_score(different))} (lowest {min(score.psnr for score in scores):.2f} dB)"
    equal = len(scores) - len(different)
    return f"{text}, {equal} identical" if equal else text


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean of each number over scores that all have it; not empty, none of them identical."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Score(
        sum(score.psnr for score in scores) / len(scores),
        mean([score.ssim for score in scores]),
        mean([score.lpips for score in scores]),
    )


def comparison_data(found: Comparison) -> dict[str, Any]:
    """For the page and as JSON. psnr is None where pictures are identical, which `identical` says."""
    pictures = [
        {
            "caption": one.caption,
            "width": one.images.shape[2],
            "height": one.images.shape[1],
            "scores": [
                {
                    "identical": math.isinf(score.psnr),
                    "psnr": None if math.isinf(score.psnr) else score.psnr,
                    "ssim": score.ssim,
                    "lpips": score.lpips,
                }
                for score in scores
            ],
        }
        for one, scores in zip(found.series, found.scores, strict=True)
    ]
    return {"count": found.count, "pictures": pictures, "notes": list(found.notes)}


def as_json(found: Comparison) -> str:
    return json.dumps(comparison_data(found), indent=1, ensure_ascii=False, allow_nan=False)
