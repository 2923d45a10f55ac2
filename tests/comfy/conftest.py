"""The real ComfyUI with the pack in it, started once for all tests that ask for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_server import ComfyServer

TEST_NODES = Path(__file__).parent / "custom_nodes"


def pack_folders(root: Path) -> dict[str, Path]:
    """What to link into ``custom_nodes``: the pack, and the nodes that only tests use."""
    helpers = sorted(folder for folder in TEST_NODES.glob("*") if (folder / "__init__.py").is_file())
    return {"ComfyUI-Snug": root, **{folder.name: folder for folder in helpers}}


@pytest.fixture(scope="session")
def comfy_server(
    root: Path, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A running server; put models under ``comfy_server.base / "models"``."""
    base = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(Path(sys.executable), comfyui_path, base, pack_folders(root)) as server:
        assert server.failed_imports() == [], server.log_tail()
        yield server
