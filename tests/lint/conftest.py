from __future__ import annotations

import os
from pathlib import Path

import pytest
from comfy_server import link_folder


@pytest.fixture
def tool_environment() -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1"}


@pytest.fixture
def snug_folder(root: Path, tmp_path: Path) -> Path:
    """A folder in which the checkout is called ``snug``: tools that look packages up by name find it there."""
    link_folder(root, tmp_path / "snug")
    return tmp_path
