"""Summaries as a picture: bars of formats, blocks and the fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from PIL import Image

from ...quant_backends.inspection.fit import Fit
from ...quant_backends.inspection.summary import Summary
from ...quant_backends.memory.plan import size_text
from .bars import COLOURS, Bar, Section, as_image, draw_sections

# Bars that are shown of a section; the rest is one more.
MAX_BARS = 14
TOO_MUCH = "#e8804a"


def draw(summaries: Sequence[Summary]) -> torch.Tensor:
    """ComfyUI's IMAGE: float32 [1, height, width, 3] from 0 to 1, the summaries under one another."""
    return as_image([_draw_one(summary) for summary in summaries])


def _draw_one(summary: Summary) -> Image.Image:
    sections = [
        Section("Bytes by format", _formats(summary)),
        Section("Bytes by blocks", _groups(summary)),
    ]
    if summary.fit is not None:
        sections.append(Section(f"Memory of {summary.fit.device.name}", _fit(summary.fit)))
    architecture = summary.architecture or "architecture not recognised"
    line = f"{architecture}, {summary.parameters / 1e9:.2f} billion weights in {size_text(summary.nbytes)}"
    return draw_sections(summary.title, line, sections)


def _formats(summary: Summary) -> list[Bar]:
    items = [(f"{use.format}  ({use.bits_per_weight:.2f} bits)", use.nbytes) for use in summary.formats]
    return _bars(items)


def _groups(summary: Summary) -> list[Bar]:
    items = []
    for group in summary.groups:
        count = len(group.blocks)
        items.append((f"{group.name}  ({count} blocks)" if count > 1 else group.name, group.nbytes))
    return _bars(items)


def _bars(items: Sequence[tuple[str, int]]) -> list[Bar]:
    if len(items) > MAX_BARS:
        rest = items[MAX_BARS - 1 :]
        items = [*items[: MAX_BARS - 1], (f"{len(rest)} more", sum(nbytes for _, nbytes in rest))]
    total = sum(nbytes for _, nbytes in items) or 1
    return [
        Bar(
            label,
            f"{size_text(nbytes)}  {_percent(nbytes / total)}",
            nbytes / total,
            COLOURS[index % len(COLOURS)],
        )
        for index, (label, nbytes) in enumerate(items)
    ]


def _percent(share: float) -> str:
    return "< 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _fit(fit: Fit) -> list[Bar]:
    device, demand = fit.device, fit.demand
    scale = max(device.free, fit.needed, 1)

    def bars(items: Iterable[tuple[str, int, str]]) -> list[Bar]:
        return [Bar(label, size_text(nbytes), nbytes / scale, colour) for label, nbytes, colour in items]

    return bars(
        [
            ("weights", demand.weights, COLOURS[0]),
            ("computing" if demand.computing is not None else "computing (not known)", demand.computing or 0)
            + (COLOURS[2],),
            ("needed with the reserve", fit.needed, TOO_MUCH if fit.offloaded else COLOURS[3]),
            ("free", device.free, COLOURS[7]),
            *([("weights that do not fit", fit.offloaded, TOO_MUCH)] if fit.offloaded else []),
        ]
    )
