"""Texts in pictures: letters that Pillow's own font lacks come from a font of the system, or are written plainly."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from font_files import write_font
from PIL import Image, ImageDraw, ImageFont

LATIN, PUNCTUATION, CYRILLIC, KANA_AND_HAN = (0x20, 0x17F), (0x2010, 0x2030), (0x400, 0x4FF), (0x3000, 0x9FFF)


@pytest.fixture
def fonts(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, on a system whose fonts are those in tmp_path."""
    module = importlib.import_module("snug.nodes.adapter.fonts")
    monkeypatch.setattr(module, "_folders", lambda: iter([tmp_path / "missing", tmp_path]))
    caches = [found for found in vars(module).values() if hasattr(found, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    yield module
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def installed(tmp_path: Path) -> Callable[..., Path]:
    def install(name: str, *ranges: tuple[int, int]) -> Path:
        path = tmp_path / "fonts" / name
        path.parent.mkdir(exist_ok=True)
        write_font(path, ranges)
        return path

    return install


def file_of(font: Any) -> Path | None:
    """None: Pillow's own, which is no file."""
    return Path(font.path) if isinstance(font.path, str) else None


def test_plain_text_needs_no_font_of_the_system(fonts: Any, installed: Callable[..., Path]) -> None:
    installed("msyh.ttc", LATIN, KANA_AND_HAN)
    text, font = fonts.fitting("Q4_K, 4.8 s …", 20)
    assert (text, file_of(font), font.size) == ("Q4_K, 4.8 s …", None, 20)


def test_the_first_font_that_has_every_letter_is_used(fonts: Any, installed: Callable[..., Path]) -> None:
    european = installed("Arial.ttf", LATIN, PUNCTUATION, CYRILLIC)
    chinese = installed("MSYH.TTC", LATIN, PUNCTUATION, KANA_AND_HAN)
    (chinese.parent / "notosanscjk-regular.ttc").write_bytes(b"no font at all")
    for caption, wanted in {
        "水墨 Q4_K": chinese,
        "ノート": chinese,
        "café – ×2": european,
        "Модель": european,
    }.items():
        text, font = fonts.fitting(caption, 18)
        assert (text, file_of(font), font.size) == (caption, wanted, 18)


def test_without_a_font_letters_become_plain_or_codes(fonts: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "snug"):
        assert fonts.fitting("café – ×2, naïve ①", 18)[0] == "cafe - x2, naive 1"
        assert not caplog.records
        for caption, shown in {
            "水墨 Q4_K": r"\u6c34\u58a8 Q4_K",
            "🙂": r"\U0001f642",
            "か": r"\u304b",
        }.items():
            text, font = fonts.fitting(caption, 18)
            assert (text, file_of(font)) == (shown, None)
    (record,) = caplog.records
    assert "Noto Sans CJK" in record.getMessage()


def test_what_the_best_font_lacks_becomes_a_code(fonts: Any, installed: Callable[..., Path]) -> None:
    chinese = installed("wqy-microhei.ttc", LATIN, KANA_AND_HAN)
    text, font = fonts.fitting("水墨🙂", 18)
    assert (text, file_of(font)) == (r"水墨\U0001f642", chinese)


def test_every_picture_shows_them(fonts: Any, installed: Callable[..., Path]) -> None:
    """Captions of a contact sheet, labels of bars and titles in the chart of a prompt: squares of the test's font."""
    sheet = importlib.import_module("snug.nodes.measure.contact_sheet")
    bars = importlib.import_module("snug.nodes.adapter.bars")
    chart = importlib.import_module("snug.nodes.telemetry.chart")
    records = importlib.import_module("snug.nodes.telemetry.record")

    def pictures(text: str) -> list[torch.Tensor]:
        record = records.PromptRecord("prompt", "cpu", started=0.0)
        record.open("1", text, 0.0, {"cpu": records.Counter(100, 0)})
        record.close("1", 1.0, {"cpu": records.Counter(100, 10**9)})
        drawn = bars.draw_sections(text, text, [bars.Section(text, [bars.Bar(text, text, 0.5, "#ffffff")])])
        timeline = chart.draw_timeline(record, 1.0)
        found = [sheet.contact_sheet([sheet.Cell(torch.zeros(320, 320, 3), text, text)])[0]]
        return [*found, *(torch.tensor(list(picture.tobytes())) for picture in (drawn, timeline))]

    without = pictures("水水")
    assert all(a.equal(b) for a, b in zip(without, pictures(r"\u6c34\u6c34"), strict=True))
    installed("msyh.ttc", LATIN, KANA_AND_HAN)
    fonts._system_fonts.cache_clear()
    fonts.fitting.cache_clear()
    with_font = pictures("水水")
    assert not any(a.shape == b.shape and a.equal(b) for a, b in zip(without, with_font, strict=True))


def test_fonts_stand_on_one_line(fonts: Any, installed: Callable[..., Path]) -> None:
    """The square of the test's font ends where capitals of Pillow's own font do."""
    installed("msyh.ttc", KANA_AND_HAN)

    def lowest(text: str) -> int:
        picture = Image.new("L", (60, 60))
        text, font = fonts.fitting(text, 30)
        fonts.write(ImageDraw.Draw(picture), (5, 5), text, font, 30, "white")
        box = picture.getbbox()
        assert box
        return box[3]

    assert isinstance(ImageFont.load_default(30), ImageFont.FreeTypeFont)
    assert abs(lowest("水") - lowest("H")) <= 1


def test_captions_without_spaces_take_two_lines(fonts: Any, installed: Callable[..., Path]) -> None:
    sheet = importlib.import_module("snug.nodes.measure.contact_sheet")
    installed("msyh.ttc", LATIN, KANA_AND_HAN)
    lines, font = sheet._wrapped(*fonts.fitting("水" * 30, 15), 320)
    assert len(lines) == 2 and "".join(lines) == "水" * 30
    assert all(font.getlength(line) <= 320 for line in lines)
