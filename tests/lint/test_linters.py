"""The linters, as tests: one command checks everything and pytest's summary is its last line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def check(command: Sequence[str], root: Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_check(root: Path) -> None:
    check([sys.executable, "-m", "ruff", "check", "--quiet", "."], root)


def test_ruff_format(root: Path) -> None:
    check([sys.executable, "-m", "ruff", "format", "--check", "--quiet", "--diff", "."], root)


@pytest.mark.slow
def test_pyright(root: Path, snug_folder: Path, tool_environment: dict[str, str]) -> None:
    # Its own Node.js, out of the environment: a machine's may be missing or too old.
    environment = {**tool_environment, "PYRIGHT_PYTHON_GLOBAL_NODE": "0", "PYTHONPATH": str(snug_folder)}
    check([sys.executable, "-m", "pyright", "--pythonpath", sys.executable], root, environment)
