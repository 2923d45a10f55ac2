"""The results of what formats do to pictures, which the README shows some of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import figure_tables
import pytest


@pytest.fixture
def result(root: Path) -> dict[str, Any]:
    path = root / "benchmarks" / "results" / "fidelity.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_figure_that_changes_is_in_the_table(result: dict[str, Any]) -> None:
    table = figure_tables.fidelity_figures(result)
    for row in result["rows"]:
        if row["target"] == "GGUF Q4_K_M":
            row["accuracy"] /= 2
    assert figure_tables.fidelity_figures(result) != table


def test_the_results_are_of_every_format_that_can_be_made(result: dict[str, Any]) -> None:
    from snug.quant_backends.quantization import targets

    measured = {row["target"] for row in result["rows"]}
    missing = {name for name, target in targets().items() if not target.unavailable} - measured
    assert missing == set(), "run: benchmarks/fidelity.py, as benchmarks/results/fidelity.md says"


def test_the_figures_are_plausible(result: dict[str, Any]) -> None:
    rows = {row["target"]: row for row in result["rows"]}
    assert rows["dense"]["accuracy"] >= 0.9
    exact, rough = rows["GGUF Q8_0"], rows["GGUF Q2_K"]
    assert exact["psnr"] > 45 and exact["psnr"] > rows["GGUF Q4_K_M"]["psnr"] > rough["psnr"]
    assert all(0 < row["ssim"] <= 1.0001 and row["nbytes"] > 0 for row in rows.values())
