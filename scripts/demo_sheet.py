"""The demo's pictures: figures against the dense model's, and all of them on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy
import torch
from digits import Judge, latents, real_digits
from digits.vae import decode
from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL, LINE = 16, 230, 22
# Smaller pictures are enlarged to this height.
HEIGHT = 96
GROUND, TEXT, FAINT = "#1e2127", "#eceff4", "#aab2c0"


def psnr(reference: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB, over all pixels; infinite when they are equal."""
    pairs = zip(reference, pictures, strict=True)
    errors = [numpy.square(_values(a) - _values(b)).mean() for a, b in pairs]
    error = float(numpy.mean(errors))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _values(picture: Image.Image) -> numpy.ndarray:
    return numpy.asarray(picture, dtype=numpy.float64)


def digits_read(pictures: Sequence[Image.Image], wanted: str) -> int:
    """How many of the pictures a classifier of real digits reads as the digits of `wanted`."""
    values = torch.from_numpy(numpy.stack([numpy.asarray(picture) for picture in pictures])).float() / 255
    found = _judge().classify(values).tolist()
    return sum(number == int(digit) for number, digit in zip(found, wanted, strict=True))


@lru_cache
def _judge() -> Judge:
    pixels, classes = real_digits()
    return Judge(decode(latents(pixels)), classes)


def write_sheet(path: Path, rows: Sequence[tuple[str, str, Sequence[Image.Image]]]) -> None:
    """A row of pictures for each (name, line below it, pictures), all of one size."""
    first = rows[0][2][0]
    scale = max(1, round(HEIGHT / first.height))
    width, height = scale * first.width, scale * first.height
    columns = max(len(pictures) for _, _, pictures in rows)
    size = (LABEL + MARGIN + columns * (width + 4), MARGIN + len(rows) * (height + MARGIN))
    sheet = Image.new("RGB", size, GROUND)
    canvas = ImageDraw.Draw(sheet)
    for number, (name, line, pictures) in enumerate(rows):
        top = MARGIN + number * (height + MARGIN)
        middle = top + height // 2
        canvas.text((MARGIN, middle - LINE), name, TEXT, ImageFont.load_default(18))
        canvas.text((MARGIN, middle + 2), line, FAINT, ImageFont.load_default(14))
        for at, picture in enumerate(pictures):
            sheet.paste(
                picture.resize((width, height), Image.Resampling.BICUBIC), (LABEL + at * (width + 4), top)
            )
    sheet.save(path)
