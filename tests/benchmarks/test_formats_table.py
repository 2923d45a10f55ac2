"""The table of formats has every target, those that round inputs measured with rounded inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from snug.quant_backends.quantization import product_targets, targets

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "formats.json"


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_every_target_has_a_row_or_a_reason(result: dict) -> None:
    rows = [row["target"] for row in result["rows"]]
    assert rows + list(result["unavailable"]) == list(dict.fromkeys(rows)) + list(result["unavailable"])
    assert {*rows, *result["unavailable"]} == {*targets(), *product_targets()}
    for row in result["rows"]:
        assert row["own"]["seconds"] > 0 and row["own"]["memory"] > 0, row["target"]
        assert row["output_errors"].keys() == {"flux", "sd3", "sdxl"}


@pytest.mark.parametrize(
    ("rounded", "plain"),
    [
        ("INT8 dynamic", "INT8 per row"),
        ("FP8 dynamic", "FP8 e4m3fn per tensor"),
        ("bitsandbytes LLM.int8", "bitsandbytes INT8"),
    ],
)
def test_rounded_inputs_add_to_the_error_of_outputs(result: dict, rounded: str, plain: str) -> None:
    rows = {row["target"]: row for row in result["rows"]}
    if rounded != "FP8 dynamic":  # whose scale the plain one chooses otherwise
        assert rows[rounded]["weight_error"] == pytest.approx(rows[plain]["weight_error"], rel=1e-3)
    for family in ("flux", "sd3"):
        assert rows[rounded]["output_errors"][family] > 1.05 * rows[plain]["output_errors"][family]
