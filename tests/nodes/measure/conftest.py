"""ComfyUI imported into the test process, as the pack's node package needs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import use_comfyui


@pytest.fixture(scope="session", autouse=True)
def comfy(comfyui_path: Path) -> None:
    use_comfyui(comfyui_path)
