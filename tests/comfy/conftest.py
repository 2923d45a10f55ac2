"""The real ComfyUI with the pack in it, started once for all tests that ask for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comfy_server import ComfyServer
from quantized_files import KINDS, quantized_twins
from tiny import make_tiny_model, use_comfyui
from twins import Twins, make_twins

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


@pytest.fixture(scope="session")
def source(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """source(family) is a tiny model of that family with its original names and dtype, made once."""
    use_comfyui(comfyui_path)
    folder = tmp_path_factory.mktemp("sources")

    def make(family: str) -> Path:
        path = folder / f"{family}.safetensors"
        if not path.exists():
            make_tiny_model(family, path)
        return path

    return make


@pytest.fixture
def twins(source: Callable[[str], Path], comfy_server: ComfyServer) -> Iterator[Callable[[str, str], Twins]]:
    """twins(family, format) puts both files into the server's model folder, for one test.

    format: a ggml type, or a kind of quantized_files.
    """
    folder = comfy_server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Twins] = []

    def make(family: str, format: str) -> Twins:
        write = quantized_twins if format in KINDS else make_twins
        made.append(write(source(family), folder, format))
        return made[-1]

    yield make
    comfy_server.free()
    for pair in made:
        pair.gguf.unlink()
        pair.dense.unlink()
