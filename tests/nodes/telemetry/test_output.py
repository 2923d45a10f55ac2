"""The report, the picture and the files."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

DEVICE = "cuda:0"
MB = 1 << 20


@pytest.fixture
def record() -> Any:
    from snug.nodes.telemetry.accounting import DeviceReading, split
    from snug.nodes.telemetry.record import Counter, PromptRecord

    record = PromptRecord("prompt", DEVICE, started=100.0)
    for number, peak in enumerate((300, 900, 500)):
        start = 101.0 + number
        record.open(str(number), f"Node {'x' * 30 * number} #{number}", start, {DEVICE: Counter(100 * MB, 0)})
        parts = split(
            DeviceReading(DEVICE, "GPU", 2000 * MB, 800 * MB, peak * MB, 950 * MB, 100 * MB, 50 * MB)
        )
        record.sample(start + 0.5, parts)
        record.close(str(number), start + 0.9, {DEVICE: Counter(120 * MB, peak * MB)})
    return record


@pytest.fixture
def sample() -> Any:
    from snug.nodes.telemetry.accounting import DeviceReading, ModelRow, Sample, split

    parts = split(DeviceReading(DEVICE, "GPU", 2000 * MB, 800 * MB, 900 * MB, 950 * MB, 300 * MB, 50 * MB))
    row = ModelRow(
        "Flux", DEVICE, ("Q4_K", "bfloat16"), 300 * MB, 200 * MB, 60 * MB, 500 * MB, False, "KSampler #3"
    )
    return Sample(104.0, (parts,), (row,))


def test_report(record: Any, sample: Any) -> None:
    from snug.nodes.telemetry.report import report_text

    text = report_text(record, sample, ["A remark."])
    assert text.startswith(
        "A remark.\nGPU (cuda:0): weights 300 MB, paged weights 50 MB, activations 600 MB, cache 50 MB"
    )
    assert "Flux (Q4_K, bfloat16): 300 MB on cuda:0, 200 MB offloaded, 60 MB pinned of 500 MB" in text
    assert "last used by KSampler #3" in text
    lines = [line.split() for line in text.splitlines() if line.startswith("  Node")]
    assert [line[line.index("peak") + 1] for line in lines] == ["900", "500", "300"]
    assert "added    800 MB" in text and "kept     20 MB" in text and "0.90 s" in text
    record.start_window(200.0)
    assert "No node has run" in report_text(record, sample)


def test_data(record: Any, sample: Any) -> None:
    from snug.nodes.telemetry.report import as_csv, as_json

    rows = list(csv.DictReader(io.StringIO(as_csv(record))))
    assert [int(row["peak_bytes"]) // MB for row in rows] == [300, 900, 500]
    assert float(rows[1]["start_seconds"]) == 2.0
    data = json.loads(as_json(record, sample))
    assert data["now"]["models"][0]["formats"] == ["Q4_K", "bfloat16"]
    assert [node["added"][DEVICE] // MB for node in data["nodes"]] == [200, 800, 400]


def test_picture_shows_the_peak_and_the_lanes(record: Any) -> None:
    from PIL import ImageColor
    from snug.nodes.telemetry.chart import HEIGHT, LEFT, PARTS, PEAK, RIGHT, WIDTH, draw_timeline

    picture = draw_timeline(record, now=104.0)
    assert picture.size == (WIDTH, HEIGHT)
    peak = ImageColor.getrgb(PEAK)
    # Over the second of the three nodes, from 2 to 2.9 of 4 seconds.
    x = int(LEFT + 2.45 / 4 * (WIDTH - LEFT - RIGHT))
    assert peak in {picture.getpixel((x, y)) for y in range(HEIGHT // 2)}
    colours = {colour for _, colour in picture.getcolors(WIDTH * HEIGHT) or []}
    assert {ImageColor.getrgb(colour) for _, colour, _ in PARTS} <= colours


def test_picture_of_nothing() -> None:
    from snug.nodes.telemetry.chart import draw_timeline
    from snug.nodes.telemetry.record import PromptRecord

    assert draw_timeline(PromptRecord("p", "cpu", 5.0), now=5.0).size == (1024, 576)


def test_files_are_numbered_and_complete(tmp_path: Path) -> None:
    from snug.nodes.telemetry.export import write_report

    paths = [write_report(tmp_path, "a/b", ".csv", f"text {number}") for number in range(3)]
    assert [path.name for path in paths] == ["b_00001.csv", "b_00002.csv", "b_00003.csv"]
    assert [path.read_text() for path in paths] == ["text 0", "text 1", "text 2"]
    assert sorted(os.listdir(tmp_path / "a")) == [path.name for path in paths]


@pytest.mark.parametrize(
    "name", ["..", "../a", "a/../../b", "/a", "a//b", "", "a\\..\\..\\b", "c:x", "a\nb", "./a"]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    from snug.nodes.telemetry.export import write_report
    from snug.quant_backends.core.errors import SnugError

    folder = tmp_path / "output"
    folder.mkdir()
    with pytest.raises(SnugError, match="filename_prefix"):
        write_report(folder, name, ".csv", "text")
    assert [*tmp_path.rglob("*")] == [folder]


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    from snug.nodes.telemetry.export import write_report
    from snug.quant_backends.core.errors import SnugError

    folder, outside = tmp_path / "output", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "link").symlink_to(outside)
    with pytest.raises(SnugError, match="filename_prefix"):
        write_report(folder, "link/a", ".csv", "text")
    (folder / "a_00001.csv").symlink_to(outside / "a")
    assert write_report(folder, "a", ".csv", "text").name == "a_00002.csv"
    assert not list(outside.iterdir())


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    from snug.nodes.telemetry.export import write_report
    from snug.quant_backends.core.errors import SnugError

    (tmp_path / "file").write_text("")
    with pytest.raises(SnugError, match="could not be written"):
        write_report(tmp_path, "file/a", ".csv", "text")
