"""The benchmarks' scripts run from end to end at the smallest size, so that a first run on a GPU is one command."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from narrow_models import accept_narrow_models

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ("--device", "cpu", "--hidden", "256", "--pixels", "32", "--text", "4", "--rounds", "1")

pytestmark = pytest.mark.comfy


@pytest.fixture
def made(comfyui_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs a script's main with arguments in this process and returns what it wrote as JSON."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from tiny import use_comfyui

    use_comfyui(comfyui_path)
    accept_narrow_models(monkeypatch)
    before = set(sys.modules)

    def run(script: str, *arguments: str) -> Any:
        paths = [tmp_path / f"{script}.md", tmp_path / f"{script}.json"]
        outputs = ["--markdown", str(paths[0]), "--json", str(paths[1])]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments, *outputs])
        importlib.import_module(script).main()
        assert "| ---" in paths[0].read_text(encoding="utf-8")
        return json.loads(paths[1].read_text(encoding="utf-8"))

    yield run
    importlib.import_module("comfy.model_management").unload_all_models()
    for name in set(sys.modules) - before:  # their names are those of anybody's modules
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_blocks_of_every_contender(made: Callable[..., Any], comfyui_path: Path) -> None:
    formats = ("GGUF Q8_0", "bitsandbytes NF4", "INT8 dynamic")
    size = (*SMALL, "--double", "1", "--single", "1")
    result = made("flux_blocks", "--comfyui", str(comfyui_path), *size, "--formats", *formats, "--peers")
    records = {record["name"]: record for record in result["modes"]["eager"]}
    assert {"dense", *(f"Snug {name}" for name in formats), "torch nn.Linear", "quanto qint8"} <= set(records)
    dense = records["dense"]
    assert dense["error"] == 0 and dense["step"] == pytest.approx(19 * dense["double"] + 38 * dense["single"])
    # Each contender computes the same model: a quarter of the result at most is lost to 4 bits.
    assert all(record["error"] < 0.25 for record in records.values())
    assert 0 < records["Snug GGUF Q8_0"]["error"] < 0.02
    assert records["torch nn.Linear"]["error"] < 1e-3
    assert records["Snug bitsandbytes NF4"]["weight_bytes"] < 0.5 * dense["weight_bytes"]


def test_loras(made: Callable[..., Any], comfyui_path: Path) -> None:
    size = ("--comfyui", str(comfyui_path), *SMALL, "--double", "1", "--single", "1")
    (merge, automatic) = made("flux_lora", *size, "--formats", "GGUF Q4_K")["records"]
    assert list(merge["seconds"]) == list(automatic["seconds"]) == ["0", "1", "4"]


def test_memory_of_published_tables(made: Callable[..., Any], comfyui_path: Path) -> None:
    tables = made("published_tables", "--comfyui", str(comfyui_path), "--device", "cpu")["tables"]
    rows = {row["name"]: row for row in tables["flux"]}
    # The same model, counted from its shapes: what was published for it, within a hundredth.
    assert rows["BF16"]["snug_bytes"] / 2**30 == pytest.approx(rows["BF16"]["loaded"], rel=0.01)
    assert rows["bitsandbytes 4-bit NF4"]["snug_bytes"] < 0.35 * rows["BF16"]["snug_bytes"]


def test_decoding(made: Callable[..., Any]) -> None:
    formats = ("Q4_K", "bnb-nf4-64")
    result = made("decoding", "--device", "cpu", "--formats", *formats, "--rounds", "1")
    assert [record["format"] for record in result["records"]] == [*formats]
    assert all(record["bandwidth"] > 0 for record in result["records"])


def test_fast_matmul(made: Callable[..., Any], comfyui_path: Path) -> None:
    size = (*SMALL, "--double", "1", "--single", "2", "--pixels", "128")
    records = made("fast_matmul", "--comfyui", str(comfyui_path), *size, "--formats", "GGUF Q4_K")["records"]
    errors = {record["way"]: record["error"] for record in records}
    assert errors["exact"] == errors["decoded weights kept"] == 0
    assert 0 < errors["int8, rounded weights kept"] < errors["fp8, rounded weights kept"] < 0.1
    copies = {record["way"]: record["copy_bytes"] for record in records}
    assert 0 < copies["int8, rounded weights kept"] < copies["decoded weights kept"]
    assert not copies["exact"] and not copies["int8, rounded in each call"]
    (one_weight,) = (record["one_weight"] for record in records if "one_weight" in record)
    assert {*one_weight} == {"decoded", "int8 by torch", "float8_e4m3fn by torch"}
    assert min(one_weight.values()) > 0


def test_targets_are_read_from_the_tables(made: Callable[..., Any]) -> None:
    rows = made("targets")["rows"]
    by_name = {row["target"]: row for row in rows}
    assert by_name["offloaded step / max, simulated device"]["gap"] == "met"
    assert all(row["measured (the worst)"] for row in rows)
    targets = importlib.import_module("targets")
    step = next(target for target in targets.TARGETS if target.source == "flux-step-cpu")
    assert (step.gap(1.5), step.gap(3.0)) == ("met", "missed by 100%")
    bandwidth = next(target for target in targets.TARGETS if target.at_least)
    assert bandwidth.gap(bandwidth.limit / 2) == "missed by 100%"
    recompiled = next(target for target in targets.TARGETS if target.limit == 0)
    assert (recompiled.gap(0), recompiled.gap(2)) == ("met", "missed by 2")


def test_offloading(made: Callable[..., Any], comfyui_path: Path) -> None:
    """On a CPU nothing is copied; what is to run on a GPU runs here all the same."""
    size = ("--comfyui", str(comfyui_path), *SMALL, "--double", "2", "--single", "4")
    records = made("flux_offload", *size, "--formats", "GGUF Q4_K")["records"]
    by_share = {record["share"]: record for record in records}
    assert {0.75, 0.0} <= set(by_share)  # others may not leave room for the slots of so few blocks
    assert 0 < by_share[0.75]["copying"] < by_share[0.0]["copying"]
    assert all(record["allowed_bytes"] > 0 for record in records)
    assert all(record["snug"] > 0 and record["comfyui"] > 0 for record in records)


def test_offloading_is_asked_for_on_a_cpu(made: Callable[..., Any], comfyui_path: Path) -> None:
    if importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match=r"No CUDA device.*offload_plan"):
        made("flux_offload", "--comfyui", str(comfyui_path), "--device", "auto")


def test_sampling_for_the_published_tables(made: Callable[..., Any]) -> None:
    model, tables = (importlib.import_module(name) for name in ("flux_model", "published_tables"))
    device = importlib.import_module("torch").device("cpu")
    size = model.Size(256, 1, 1, 32, 4)
    dense = model.dense_model(model.random_weights(size, device))
    row = next(row for row in tables.FLUX if row.target == "GGUF Q8_0")
    found = tables.sampled(row, dense, 2, lambda patcher: model.caller(patcher, size), device)
    assert found["seconds"] > 0 and found["growth"] == 0  # torch does not count on a CPU


def test_the_list_of_targets_is_of_the_newest_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    targets = importlib.import_module("targets")
    written = (targets.RESULTS / "targets.md").read_text(encoding="utf-8")
    for row in targets.rows(targets.read_tables()):
        assert f"| {' | '.join(row)} |" in written, "run benchmarks/targets.py"


# A row of each table, as its `measure` makes it.
ROWS = {
    "decoding": {"format": "Q8_0", "shape": (1, 1), "bandwidth": 1.0, "copy": 1.0, "peer": None, "host": 1.0},
    "flux_lora": {"format": "x", "way": "merge", "seconds": {"0": 1.0, "1": 1.0, "4": 1.0}},
    "fast_matmul": [
        {"format": "x", "way": "exact", "seconds": 1.0, "dense_ratio": 1.0, "exact_ratio": 1.0, "error": 0.0}
        | {"weight_bytes": 1, "copy_bytes": 1}
    ],
    "flux_compile": [{"format": "x", "change": "first call", "first": 1.0, "later": 1.0, "graphs": 1}],
    "flux_offload": [
        {"format": "x", "share": 0.5, "computing": 1.0, "copying": 1.0, "snug": 1.0, "comfyui": 1.0}
        | {"snug_ratio": 1.0, "comfyui_ratio": 1.0, "plan": ""}
    ],
}


@pytest.mark.parametrize("script", ROWS)
def test_what_fails_does_not_end_a_table_and_what_ends_it_leaves_the_rows(
    script: str,
    made: Callable[..., Any],
    comfyui_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[str] = []

    def measure(*_: Any) -> Any:
        calls.append(script)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ROWS[script]

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module(script), "measure", measure)
    size = ("--comfyui", str(comfyui_path), *SMALL, "--double", "1", "--single", "1")
    arguments = ("--device", "cpu") if script == "decoding" else size
    with pytest.raises(KeyboardInterrupt):
        made(script, *arguments, "--formats", "Q8_0", "Q4_0", "Q4_K")
    assert "left out: Q8_0" in capsys.readouterr().err
    assert len(json.loads((tmp_path / f"{script}.json").read_text())["records"]) == 1
    assert "| ---" in (tmp_path / f"{script}.md").read_text(encoding="utf-8")
