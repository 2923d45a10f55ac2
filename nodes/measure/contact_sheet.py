"""Pictures on one sheet with their captions below, for sharing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

from ..adapter.fonts import Font, fitting, write

# Longer sides of a picture on the sheet: smaller ones are enlarged so that captions fit, larger ones reduced.
SMALLEST, LARGEST = 320, 1024
MARGIN, GAP = 16, 12
# A card of its own colour is readable on dark and on light pages.
GROUND, TEXT, FAINT = "#1e2127", "#eceff4", "#b4bcc9"
CAPTION_LINES = 2
SMALLEST_FONT, LARGEST_FONT, LETTERS = 15, 30, 24


@dataclass(frozen=True, slots=True)
class Cell:
    """image: [H, W, 3] from 0 to 1. detail: a line in fainter letters, may be empty."""

    image: torch.Tensor
    caption: str
    detail: str


def columns_of(count: int) -> int:
    """Up to three beside one another, then as near to a square as possible."""
    return count if count <= 3 else math.ceil(math.sqrt(count))


def contact_sheet(cells: Sequence[Cell]) -> torch.Tensor:
    """ComfyUI's IMAGE: float32 [1, height, width, 3]. Cells are as large as the first one's image."""
    height, width = cells[0].image.shape[:2]
    width, height = _shown_size(width, height)
    size = min(max(width // LETTERS, SMALLEST_FONT), LARGEST_FONT)
    small = max(SMALLEST_FONT - 2, round(size * 0.85))
    line = round(size * 1.35)
    captions = [_wrapped(*fitting(cell.caption, size), width) for cell in cells]
    cell_height = height + 6 + line * (max(len(lines) for lines, _ in captions) + 1)
    columns = columns_of(len(cells))
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new(
        "RGB",
        (
            2 * MARGIN + columns * width + (columns - 1) * GAP,
            2 * MARGIN + rows * cell_height + (rows - 1) * GAP,
        ),
        GROUND,
    )
    canvas = ImageDraw.Draw(sheet)
    for number, (cell, (caption, font)) in enumerate(zip(cells, captions, strict=True)):
        left = MARGIN + number % columns * (width + GAP)
        top = MARGIN + number // columns * (cell_height + GAP)
        picture = _picture(cell.image, width, height)
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        below = top + height + 6
        for text in caption:
            write(canvas, (left, below), text, font, size, TEXT)
            below += line
        details, font = _wrapped(*fitting(cell.detail, small), width, 1)
        for text in details:
            write(canvas, (left, below), text, font, small, FAINT)
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(1, sheet.height, sheet.width, 3).float() / 255


def _shown_size(width: int, height: int) -> tuple[int, int]:
    longest = max(width, height)
    if longest < SMALLEST:
        factor = math.ceil(SMALLEST / longest)  # whole, so that pixels stay squares
        return width * factor, height * factor
    factor = min(1.0, LARGEST / longest)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _picture(image: torch.Tensor, width: int, height: int) -> Image.Image:
    """As large as fits into the cell."""
    values = (image.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    picture = Image.frombytes("RGB", (values.shape[1], values.shape[0]), bytes(values.numpy().tobytes()))
    factor = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    if size == picture.size:
        return picture
    return picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def _wrapped(text: str, font: Font, width: int, most: int = CAPTION_LINES) -> tuple[list[str], Font]:
    """(at most so many lines of at most `width` pixels, font); what does not fit ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.extend(_pieces(word, font, width))
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, font, width) for line in lines], font


def _pieces(word: str, font: Font, width: int) -> list[str]:
    """Chinese and Japanese have no spaces to break lines at, and names of files may have none."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _cut(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
