"""Reports as a picture: sections of bars on a dark ground that looks well in both themes. No ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

from .fonts import fitting, write

WIDTH, MARGIN = 1000, 28
LABEL_WIDTH, VALUE_WIDTH = 330, 210
ROW, BAR, GAP = 28, 18, 14
# So that what is there can be seen.
LEAST_BAR = 2
TITLE_SIZE, HEAD_SIZE, TEXT_SIZE = 24, 17, 15
GROUND, TEXT, FAINT, TRACK = "#1e2127", "#eceff4", "#aab2c0", "#343a46"
# Told apart by brightness as well as by hue (Okabe and Ito's colours, lightened).
COLOURS = ("#56b4e9", "#e69f00", "#35c19b", "#f0e442", "#cc8fb8", "#e8804a", "#8fa9ff", "#c9c9c9")


@dataclass(frozen=True, slots=True)
class Bar:
    """share: of the width, up to 1. spread: shares between which a line is drawn across the bar's end."""

    label: str
    value: str
    share: float
    colour: str
    spread: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Section:
    head: str
    bars: Sequence[Bar]


def draw_sections(title: str, line: str, sections: Sequence[Section]) -> Image.Image:
    """RGB, as high as it needs to be. line: below the title."""
    height = 2 * MARGIN + 2 * ROW + sum(ROW * (len(section.bars) + 1) + GAP for section in sections)
    picture = Image.new("RGB", (WIDTH, height), GROUND)
    canvas = ImageDraw.Draw(picture)
    top = MARGIN
    _text(canvas, MARGIN, top, title, TITLE_SIZE, TEXT, WIDTH - 2 * MARGIN)
    top += ROW + 4
    _text(canvas, MARGIN, top, line, TEXT_SIZE, FAINT, WIDTH - 2 * MARGIN)
    top += ROW + GAP
    for section in sections:
        _text(canvas, MARGIN, top, section.head, HEAD_SIZE, TEXT, WIDTH - 2 * MARGIN)
        top += ROW
        for bar in section.bars:
            _draw_bar(canvas, top, bar)
            top += ROW
        top += GAP
    return picture


def as_image(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """ComfyUI's IMAGE: float32 [1, height, width, 3] from 0 to 1, the pictures under one another."""
    whole = Image.new("RGB", (WIDTH, sum(picture.height for picture in pictures)), GROUND)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    pixels = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8)
    return pixels.view(1, whole.height, whole.width, 3).float() / 255


def _draw_bar(canvas: ImageDraw.ImageDraw, top: int, bar: Bar) -> None:
    left, right = MARGIN + LABEL_WIDTH, WIDTH - MARGIN - VALUE_WIDTH
    _text(canvas, MARGIN, top, bar.label, TEXT_SIZE, TEXT, LABEL_WIDTH - GAP)
    canvas.rectangle((left, top + 2, right, top + 2 + BAR), fill=TRACK)
    length = round(min(1.0, bar.share) * (right - left))
    if bar.share:
        length = max(length, LEAST_BAR)
        canvas.rectangle((left, top + 2, left + length, top + 2 + BAR), fill=bar.colour)
    if bar.spread is not None:
        low, high = (left + round(min(1.0, share) * (right - left)) for share in bar.spread)
        middle = top + 2 + BAR // 2
        for colour, width in ((GROUND, 5), (TEXT, 2)):  # dark around it: seen on every colour
            canvas.line((low, middle, high, middle), fill=colour, width=width)
            for x in (low, high):
                canvas.line((x, middle - 5, x, middle + 5), fill=colour, width=width)
    _text(canvas, right + GAP, top, bar.value, TEXT_SIZE, TEXT, VALUE_WIDTH - GAP)


def _text(
    canvas: ImageDraw.ImageDraw, left: int, top: int, text: str, size: int, colour: str, width: int
) -> None:
    """Text of at most `width` pixels: the middle of longer ones is left out."""
    text, font = fitting(text, size)
    shown, kept = text, len(text)
    while kept > 4 and canvas.textlength(shown, font=font) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    write(canvas, (left, top), shown, font, size, colour)
