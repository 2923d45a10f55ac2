"""The example workflows, opened in the page and run with tiny models under the names of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_page import ComfyPage
from comfy_server import ComfyServer
from stand_ins import write_stand_ins

pytestmark = [pytest.mark.comfy, pytest.mark.page, pytest.mark.slow]

OpenPage = Callable[..., ComfyPage]
# What makes a run short, by node: values of inputs. Compiling for real is tested elsewhere.
SHORT: dict[str, dict[str, Any]] = {
    "EmptySD3LatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
    "SnugBenchmark": {"steps": 2, "runs": 1, "warmup": 0},
    "SnugTorchCompile": {"backend": "eager"},
}
READ_NODES = """() => window.app.graph.nodes.map(node => {
    const [x, y, width, height] = node.getBounding();
    return { id: node.id, type: node.type, known: !node.has_errors, box: [x, y, x + width, y + height] };
})"""
SIZE = (2200, 1500)  # of the window: everything of a workflow can be read
# Shows the whole graph between the page's bars; returns where it is on the page.
FIT = """() => {
    const { canvas } = window.app;
    const boxes = canvas.graph.nodes.map(node => node.getBounding());
    const left = Math.min(...boxes.map(([x]) => x)), top = Math.min(...boxes.map(([, y]) => y));
    const width = Math.max(...boxes.map(([x, , w]) => x + w)) - left;
    const height = Math.max(...boxes.map(([, y, , h]) => y + h)) - top;
    const scale = Math.min(1, (window.innerWidth - 180) / width, (window.innerHeight - 560) / height);
    canvas.ds.scale = scale;
    canvas.ds.offset[0] = 100 / scale - left;
    canvas.ds.offset[1] = 180 / scale - top;
    canvas.low_quality_zoom_threshold = 0;  // of older pages: text is drawn at any size
    canvas.setDirty(true, true);
    const place = canvas.canvas.getBoundingClientRect();
    return { x: place.x + 85, y: place.y + 165, width: width * scale + 30, height: height * scale + 30 };
}"""


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "example_workflows"


def test_each_opens_and_runs(
    open_page: OpenPage,
    page_server: ComfyServer,
    folder: Path,
    comfyui_path: Path,
    screenshots: Path,
    tmp_path: Path,
) -> None:
    """Every node and file is known, no node lies over another, and pictures come out."""
    write_stand_ins(page_server.base / "models", comfyui_path, tmp_path)
    page = open_page(size=SIZE)
    page.set_setting("LiteGraph.Canvas.MinFontSizeForLOD", 0)
    for path in sorted(folder.glob("*.json")):
        page.load_graph(json.loads(path.read_text(encoding="utf-8")))
        page.page.wait_for_timeout(300)
        nodes = page.page.evaluate(READ_NODES)
        assert [node["type"] for node in nodes if not node["known"]] == [], path.name
        assert overlapping(nodes) == [], path.name
        place = page.page.evaluate(FIT)
        page.page.wait_for_timeout(300)
        picture = screenshots / "workflows" / f"{path.stem}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        page.page.screenshot(path=picture, clip=place, animations="disabled")
        prompt = page.page.evaluate("async () => (await window.app.graphToPrompt()).output")
        for node in prompt.values():
            node["inputs"].update(SHORT.get(node["class_type"], {}))
        outputs = page_server.run(prompt)
        pictures = [image for output in outputs.values() for image in output.get("images", ())]
        assert pictures, path.name


def overlapping(nodes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        (first["type"], second["type"])
        for number, first in enumerate(nodes)
        for second in nodes[:number]
        if all(
            first["box"][side] < second["box"][side + 2] and second["box"][side] < first["box"][side + 2]
            for side in (0, 1)
        )
    ]
