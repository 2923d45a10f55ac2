"""Fonts for texts in pictures. Pillow's own has little but ASCII, the system's have the rest. No ComfyUI."""

from __future__ import annotations

import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger("snug")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Regular fonts that systems come with, in lower case. First those of European scripts, which look more like Pillow's
# own, then those that have Chinese and Japanese (and most have all the rest), then those of Korean.
NAMES = (
    *("segoeui.ttf", "arial.ttf", "dejavusans.ttf", "notosans-regular.ttf", "liberationsans-regular.ttf"),
    *(
        "msyh.ttc",
        "yugothm.ttc",
        "yugothr.ttc",
        "meiryo.ttc",
        "msgothic.ttc",
        "msjh.ttc",
        "simsun.ttc",
        "simhei.ttf",
    ),
    *("pingfang.ttc", "hiragino sans gb.ttc", "stheiti light.ttc", "arial unicode.ttf"),
    *("notosanscjk-regular.ttc", "notosanscjk-vf.ttc", "notosanscjk-vf.otf.ttc", "sourcehansans-regular.ttc"),
    *(
        "notosanscjksc-regular.otf",
        "notosanssc-regular.otf",
        "sourcehansanssc-regular.otf",
        "sourcehansanscn-regular.otf",
    ),
    *("notosanscjkjp-regular.otf", "notosansjp-regular.otf", "sourcehansansjp-regular.otf"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "droidsansfallbackfull.ttf", "droidsansfallback.ttf", "ipag.ttf"),
    *("malgun.ttf", "applesdgothicneo.ttc", "nanumgothic.ttf", "unifont.ttf", "unifont.otf"),
)
# Written instead of letters that no font has, where Unicode itself names nothing simpler.
PLAIN = {"–": "-", "—": "-", "×": "x", "→": "->", "‘": "'", "’": "'", "“": '"', "”": '"', "µ": "u", "ß": "ss"}
# No letter: shows what a font draws for those that it lacks.
NO_LETTER = "\uffff"
PROBED_SIZE = 20


@lru_cache(maxsize=512)
def fitting(text: str, size: int) -> tuple[str, Font]:
    """What to draw, and a font of that size (pixels) that has all of it: Pillow's own, or one of the system.

    Where no font has every letter, those that are missing become their nearest plain letters ("é" is "e") or their
    codes ("\\u6c34"), which the log explains once.
    """
    own = ImageFont.load_default(size)
    missing = _missing(text, None)
    chosen: Path | None = None
    for path in _system_fonts() if missing else ():
        fewer = _missing(text, path)
        if len(fewer) < len(missing):
            missing, chosen = fewer, path
        if not missing:
            break
    if missing:
        text = "".join(_plain(letter, chosen) if letter in missing else letter for letter in text)
    return text, own if chosen is None else ImageFont.truetype(str(chosen), size)


def write(
    canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, font: Font, size: int, colour: str
) -> None:
    """Text on the line that Pillow's own font of that size has at `place` (left, top), whichever font it is in."""
    own = ImageFont.load_default(size)
    if isinstance(font, ImageFont.FreeTypeFont) and isinstance(own, ImageFont.FreeTypeFont):
        below = own.getmetrics()[0]
        canvas.text((place[0], place[1] + below), text, font=font, fill=colour, anchor="ls")
    else:
        canvas.text(place, text, font=font, fill=colour)


def _plain(letter: str, path: Path | None) -> str:
    simpler = PLAIN.get(letter) or "".join(
        part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part)
    )
    if simpler not in ("", letter) and not _missing(simpler, path):
        return simpler
    _tell()
    return letter.encode("ascii", "backslashreplace").decode()


@lru_cache(maxsize=1)
def _tell() -> None:
    logger.warning(
        "No font of this system has every letter of a text in a picture, which shows codes such as \\u6c34 instead: "
        "install one that has, such as Noto Sans CJK for Chinese and Japanese, and restart ComfyUI."
    )


def _missing(text: str, path: Path | None) -> frozenset[str]:
    """The letters of the text that a font lacks. path: of its file, None for Pillow's own."""
    return frozenset(letter for letter in set(text) if not letter.isspace() and not _has(letter, path))


@lru_cache(maxsize=4096)
def _has(letter: str, path: Path | None) -> bool:
    font = _probed(path)
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType has Latin-1
        return ord(letter) < 256
    return _drawn(font, letter) != _drawn(font, NO_LETTER)


@lru_cache(maxsize=len(NAMES) + 1)
def _probed(path: Path | None) -> Font:
    return ImageFont.load_default(PROBED_SIZE) if path is None else ImageFont.truetype(str(path), PROBED_SIZE)


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[float, bytes]:
    picture = Image.new("L", (2 * PROBED_SIZE, 2 * PROBED_SIZE))
    ImageDraw.Draw(picture).text((0, 0), letter, font=font, fill="white")
    return font.getlength(letter), picture.tobytes()


@lru_cache(maxsize=1)
def _system_fonts() -> tuple[Path, ...]:
    """The files of NAMES that this system has, in that order; those that cannot be read are left out."""
    found: dict[str, Path] = {}
    for folder in _folders():
        for parent, _, names in os.walk(folder):
            for name in names:
                if name.lower() in NAMES:
                    found.setdefault(name.lower(), Path(parent, name))
    return tuple(found[name] for name in NAMES if name in found and _opens(found[name]))


def _opens(path: Path) -> bool:
    try:
        return bool(_probed(path))
    except OSError:
        return False


def _folders() -> Iterator[Path]:
    """Where systems keep fonts, the user's own first."""
    home = Path.home()
    if sys.platform == "win32":
        yield Path(os.environ.get("LOCALAPPDATA", home), "Microsoft", "Windows", "Fonts")
        yield Path(os.environ.get("WINDIR", r"C:\Windows"), "Fonts")
    elif sys.platform == "darwin":
        yield home / "Library" / "Fonts"
        yield from map(Path, ("/Library/Fonts", "/System/Library/Fonts", "/System/Library/AssetsV2"))
    else:
        yield home / ".fonts"
        yield Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share", "fonts")
        for folder in (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":"):
            yield Path(folder, "fonts")
