"""All tables in one run: one that fails, or takes too long, does not stop the others."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Writes a row at once and ends as the script's name says.
SCRIPT = """
import pathlib, sys, time
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text('{"records": [1]}')
END
"""
ENDS = {"slow": "time.sleep(60)", "broken": "raise SystemExit(3)", "good": ""}


def test_tables_after_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    everything = importlib.import_module("all")
    results = tmp_path / "results"
    results.mkdir()
    for name, end in {**ENDS, "targets": ""}.items():
        (tmp_path / f"{name}.py").write_text(SCRIPT.replace("END", end))
    monkeypatch.setattr(everything, "FOLDER", tmp_path)
    monkeypatch.setattr(everything, "TABLES", tuple(everything.Table(name, f"{name}.py") for name in ENDS))
    run, seconds = everything.run, {"slow.py": 4.0}
    monkeypatch.setattr(
        everything, "run", lambda words, limit: run(words, seconds.get(Path(words[1]).name, limit))
    )
    monkeypatch.setattr(sys, "argv", ["all.py"])
    assert everything.main() == 1
    for name in ENDS:
        (file,) = results.glob(f"{name}-*.json")
        assert json.loads(file.read_text()) == {"records": [1]}
    said = capsys.readouterr().err
    assert "slow: took more than 4 s" in said and "broken: ended with 3" in said and "good" not in said
    assert (results / "targets.json").exists()
