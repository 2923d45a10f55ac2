"""The page of a real ComfyUI in a real browser."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_page import ComfyPage, find_chromium, launch
from comfy_server import ComfyServer
from playwright.sync_api import Browser, sync_playwright
from stand_ins import write_stand_ins

TEST_NODES = Path(__file__).parents[1] / "comfy" / "custom_nodes" / "snug_test_nodes"


@pytest.fixture(scope="session")
def page_server(
    root: Path, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A ComfyUI of its own for all pages: settings of the page are the server's."""
    packs = {"ComfyUI-Snug": root, TEST_NODES.name: TEST_NODES}
    base = tmp_path_factory.mktemp("page")
    with ComfyServer(Path(sys.executable), comfyui_path, base, packs) as server:
        assert server.failed_imports() == [], server.log_tail()
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium: install one (apt install chromium), or name it in SNUG_CHROMIUM")
    with sync_playwright() as playwright:
        found = launch(playwright, program)
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser, page_server: ComfyServer) -> Iterator[Callable[..., ComfyPage]]:
    """open_page(theme, renderer): another tab. The pack's scripts must not have failed in any of them."""
    opened: list[ComfyPage] = []

    def open_one(*args: str, size: tuple[int, int] | None = None) -> ComfyPage:
        page = ComfyPage(browser, page_server, *([size] if size else []))
        opened.append(page)
        page.open(*args)  # type: ignore[arg-type]
        return page

    yield open_one
    errors = [error for page in opened for error in page.errors]
    for page in opened:
        page.close()
    assert errors == []


@pytest.fixture(scope="session")
def screenshots(root: Path, comfyui_path: Path) -> Path:
    """Where pictures of the page are kept for people to look at, by ComfyUI's version."""
    text = (comfyui_path / "comfyui_version.py").read_text(encoding="utf-8")
    version = text.rpartition("__version__ = ")[2].strip().strip("\"'")
    return root / "test-output" / "page" / version


@pytest.fixture(scope="module")
def example_graph(
    root: Path, comfyui_path: Path, page_server: ComfyServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The example workflow, for a picture that takes a second; tiny models lie where it wants its files."""
    write_stand_ins(page_server.base / "models", comfyui_path, tmp_path_factory.mktemp("sources"))
    path = root / "example_workflows" / "snug_vram_monitor.json"
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["type"]: node for node in graph["nodes"]}
    nodes["EmptySD3LatentImage"]["widgets_values"] = [64, 64, 1]
    nodes["KSampler"]["widgets_values"][2] = 4
    return graph


@pytest.fixture
def example(example_graph: dict[str, Any]) -> dict[str, Any]:
    """One for each test, which may change it."""
    return copy.deepcopy(example_graph)
