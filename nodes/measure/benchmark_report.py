"""What was measured, as text, CSV, JSON and a picture. No ComfyUI."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from ..adapter.bars import COLOURS, Bar, Section, as_image, draw_sections
from ..telemetry.report import size_text
from .benchmark import Plan, Row, as_data

TITLE = "Benchmark"
COLUMNS: tuple[str, ...] = (
    "caption",
    "formats",
    "device",
    "loading",
    "weights",
    "memory",
    "peak",
    "step",
    "step_low",
    "step_high",
    "compiling",
    "total",
    "error",
    "psnr",
    "ssim",
    "problem",
)
NOTHING = "–"


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def report_text(rows: Sequence[Row], plan: Plan) -> str:
    """A table with a line for each model, and what its columns mean."""
    head: tuple[str, ...] = ("", "load", "weights", "memory", "peak", "per step", "middle half", "compile")
    quality = any(row.error is not None or not row.is_finite for row in rows)
    pictures = any(row.ssim is not None or row.psnr is not None for row in rows)
    head += ("error",) * quality + ("PSNR", "SSIM") * pictures
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        cells = (row.caption, *_cells(row), *(_error(row),) * quality)
        cells += (_decibels(row), _number(row.ssim)) * pictures
        lines.append((row.caption, row.problem) if row.problem else cells)
    return f"{_table(lines)}\n\n{_line(rows, plan)}\n{_meaning(rows, quality)}"


def _cells(row: Row) -> tuple[str, ...]:
    spread = NOTHING if row.spread is None else " to ".join(seconds_text(value) for value in row.spread)
    sizes = (NOTHING if value is None else size_text(value) for value in (row.weights, row.memory, row.peak))
    return seconds_text(row.loading), *sizes, seconds_text(row.step), spread, seconds_text(row.compiling)


def _line(rows: Sequence[Row], plan: Plan) -> str:
    sampling = plan.sampling
    device = rows[0].device if rows else NOTHING
    return (
        f"{plan.runs} runs of {sampling.steps} steps each after {plan.warmup} to warm up; {sampling.sampler_name}, "
        f"{sampling.scheduler}, cfg {sampling.cfg:g}, seed {sampling.seed}; on {device}"
    )


def _meaning(rows: Sequence[Row], quality: bool) -> str:
    where = "RAM of ComfyUI, all else in it included" if rows and rows[0].device == "cpu" else "device memory"
    text = f"memory: {where}, after loading. per step: the median; middle half: the quartiles."
    text += " compile: what the first step of all took more."
    return text + " error: of the latent, against the first model's." * quality


def _error(row: Row) -> str:
    if row.error is None:
        return NOTHING if row.is_finite else "not finite"
    return "none" if row.error == 0 else f"{100 * row.error:.2g} %"


def _decibels(row: Row) -> str:
    if row.psnr is not None:
        return f"{row.psnr:.1f} dB"
    return NOTHING if row.ssim is None else "identical"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    count = max(len(line) for line in lines)
    widths = [max(len(line[at]) for line in lines if at < len(line)) for at in range(count)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if at == 0 else text.rjust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    )


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each model; seconds and bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        low, high = row.spread or (None, None)
        more = {"step": row.step, "step_low": low, "step_high": high, "compiling": row.compiling}
        more |= {
            "formats": " ".join(row.formats),
            "total": sum(row.totals) / len(row.totals) if row.totals else None,
        }
        plain = {name: getattr(row, name) for name in COLUMNS if name not in more and hasattr(row, name)}
        writer.writerow({**plain, **more})
    return text.getvalue()


def as_json(rows: Sequence[Row], plan: Plan, environment: Mapping[str, Any]) -> str:
    """Every number, seconds and bytes; the settings and the environment."""
    data = {"plan": asdict(plan), "environment": environment, "models": [as_data(row) for row in rows]}
    return json.dumps(data, indent=1)


class _Chart(NamedTuple):
    """value: what bars are as long as; text: beside them. has_spread: whether the steps' spread is drawn as well."""

    head: str
    value: Callable[[Row], float | None]
    text: Callable[[Row], str]
    has_spread: bool = False


_CHARTS = (
    _Chart(
        "Time per step: the median, and what half of the steps lie between",
        lambda row: row.step,
        lambda row: seconds_text(row.step),
        has_spread=True,
    ),
    _Chart("Highest memory", lambda row: row.peak, lambda row: size_text(row.peak or 0)),
    _Chart("Weights on the device", lambda row: row.weights, lambda row: size_text(row.weights or 0)),
    _Chart("Time to load", lambda row: row.loading, lambda row: seconds_text(row.loading)),
    _Chart(
        "Compiling: the first step beside the median one",
        lambda row: row.compiling,
        lambda row: seconds_text(row.compiling),
    ),
    _Chart(
        "Error of the latent against the first model's",
        lambda row: row.error,
        _error,
    ),
    _Chart(
        "SSIM, and PSNR, with the first model's pictures",
        lambda row: row.ssim,
        lambda row: f"{_number(row.ssim)}, {_decibels(row)}",
    ),
)


def draw(rows: Sequence[Row], plan: Plan) -> torch.Tensor:
    """ComfyUI's IMAGE, float32 [1, height, 1000, 3]: bars of what was measured of any model."""
    sections = [_section(rows, chart) for chart in _CHARTS]
    return as_image([draw_sections(TITLE, _line(rows, plan), [found for found in sections if found.bars])])


def _section(rows: Sequence[Row], chart: _Chart) -> Section:
    """A bar for each model that has the value; none at all where no model has more than 0."""
    spreads = {id(row): row.spread for row in rows if chart.has_spread and row.spread}
    values = {id(row): chart.value(row) for row in rows}
    ends = [high for _, high in spreads.values()]
    scale = max((value for value in (*values.values(), *ends) if value is not None), default=0)
    bars = []
    for number, row in enumerate(rows):
        value, spread = values[id(row)], spreads.get(id(row))
        if value is None or not scale:
            continue
        shares = (spread[0] / scale, spread[1] / scale) if spread else None
        colour = COLOURS[number % len(COLOURS)]
        bars.append(Bar(row.caption, chart.text(row), value / scale, colour, shares))
    return Section(chart.head, bars)
