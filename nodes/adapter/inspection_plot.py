"""Summaries as a picture: bars of formats, blocks and the fit, on a dark ground that looks well in both themes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from ...quant_backends.inspection.fit import Fit
from ...quant_backends.inspection.summary import Summary
from ...quant_backends.memory.plan import size_text

WIDTH, MARGIN = 1000, 28
LABEL_WIDTH, VALUE_WIDTH = 330, 210
ROW, BAR, GAP = 28, 18, 14
# So that what is there can be seen.
LEAST_BAR = 2
TITLE_SIZE, HEAD_SIZE, TEXT_SIZE = 24, 17, 15
# Bars that are shown of a section; the rest is one more.
MAX_BARS = 14
GROUND, TEXT, FAINT, TRACK = "#1e2127", "#eceff4", "#aab2c0", "#343a46"
# Told apart by brightness as well as by hue (Okabe and Ito's colours, lightened).
COLOURS = ("#56b4e9", "#e69f00", "#35c19b", "#f0e442", "#cc8fb8", "#e8804a", "#8fa9ff", "#c9c9c9")
TOO_MUCH = "#e8804a"


@dataclass(frozen=True, slots=True)
class _Bar:
    """share: of the width, up to 1."""

    label: str
    value: str
    share: float
    colour: str


def draw(summaries: Sequence[Summary]) -> torch.Tensor:
    """ComfyUI's IMAGE: float32 [1, height, width, 3] from 0 to 1, the summaries under one another."""
    pictures = [_draw_one(summary) for summary in summaries]
    whole = Image.new("RGB", (WIDTH, sum(picture.height for picture in pictures)), GROUND)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    pixels = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8)
    return pixels.view(1, whole.height, whole.width, 3).float() / 255


def _draw_one(summary: Summary) -> Image.Image:
    sections = [("Bytes by format", _formats(summary)), ("Bytes by blocks", _groups(summary))]
    if summary.fit is not None:
        sections.append((f"Memory of {summary.fit.device.name}", _fit(summary.fit)))
    height = 2 * MARGIN + 2 * ROW + sum(ROW * (len(bars) + 1) + GAP for _, bars in sections)
    picture = Image.new("RGB", (WIDTH, height), GROUND)
    canvas = ImageDraw.Draw(picture)
    top = MARGIN
    _text(canvas, MARGIN, top, summary.title, TITLE_SIZE, TEXT, WIDTH - 2 * MARGIN)
    top += ROW + 4
    architecture = summary.architecture or "architecture not recognised"
    line = f"{architecture}, {summary.parameters / 1e9:.2f} billion weights in {size_text(summary.nbytes)}"
    _text(canvas, MARGIN, top, line, TEXT_SIZE, FAINT, WIDTH - 2 * MARGIN)
    top += ROW + GAP
    for head, bars in sections:
        _text(canvas, MARGIN, top, head, HEAD_SIZE, TEXT, WIDTH - 2 * MARGIN)
        top += ROW
        for bar in bars:
            _draw_bar(canvas, top, bar)
            top += ROW
        top += GAP
    return picture


def _formats(summary: Summary) -> list[_Bar]:
    items = [(f"{use.format}  ({use.bits_per_weight:.2f} bits)", use.nbytes) for use in summary.formats]
    return _bars(items)


def _groups(summary: Summary) -> list[_Bar]:
    items = []
    for group in summary.groups:
        count = len(group.blocks)
        items.append((f"{group.name}  ({count} blocks)" if count > 1 else group.name, group.nbytes))
    return _bars(items)


def _bars(items: Sequence[tuple[str, int]]) -> list[_Bar]:
    if len(items) > MAX_BARS:
        rest = items[MAX_BARS - 1 :]
        items = [*items[: MAX_BARS - 1], (f"{len(rest)} more", sum(nbytes for _, nbytes in rest))]
    total = sum(nbytes for _, nbytes in items) or 1
    return [
        _Bar(
            label,
            f"{size_text(nbytes)}  {_percent(nbytes / total)}",
            nbytes / total,
            COLOURS[index % len(COLOURS)],
        )
        for index, (label, nbytes) in enumerate(items)
    ]


def _percent(share: float) -> str:
    return "< 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _fit(fit: Fit) -> list[_Bar]:
    device, demand = fit.device, fit.demand
    scale = max(device.free, fit.needed, 1)

    def bars(items: Iterable[tuple[str, int, str]]) -> list[_Bar]:
        return [_Bar(label, size_text(nbytes), nbytes / scale, colour) for label, nbytes, colour in items]

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


def _draw_bar(canvas: ImageDraw.ImageDraw, top: int, bar: _Bar) -> None:
    left, right = MARGIN + LABEL_WIDTH, WIDTH - MARGIN - VALUE_WIDTH
    _text(canvas, MARGIN, top, bar.label, TEXT_SIZE, TEXT, LABEL_WIDTH - GAP)
    canvas.rectangle((left, top + 2, right, top + 2 + BAR), fill=TRACK)
    length = round(min(1.0, bar.share) * (right - left))
    if bar.share:
        length = max(length, LEAST_BAR)
        canvas.rectangle((left, top + 2, left + length, top + 2 + BAR), fill=bar.colour)
    _text(canvas, right + GAP, top, bar.value, TEXT_SIZE, TEXT, VALUE_WIDTH - GAP)


def _text(
    canvas: ImageDraw.ImageDraw, left: int, top: int, text: str, size: int, colour: str, width: int
) -> None:
    """Text of at most `width` pixels: the middle of longer ones is left out."""
    font = ImageFont.load_default(size)
    shown, kept = text, len(text)
    while kept > 4 and canvas.textlength(shown, font=font) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    canvas.text((left, top), shown, font=font, fill=colour)
