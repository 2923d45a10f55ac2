"""Makes the pack importable as ``snug`` and tells the tests which environment they run in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from snug_path import ROOT, register_snug

if any(Path(entry or ".").resolve() == ROOT for entry in sys.path):
    raise pytest.UsageError(
        "the checkout is on sys.path, where its folder nodes/ shadows ComfyUI's nodes.py: "
        "run ./test or the pytest program instead of python -m pytest"
    )
register_snug()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI under test; skips where pytest was started by hand without one."""
    value = os.environ.get("SNUG_COMFYUI_PATH")
    if not value:
        pytest.skip(
            'SNUG_COMFYUI_PATH is not set: run ./test, or export what "python scripts/bootstrap.py --print-env" prints'
        )
    return Path(value)
