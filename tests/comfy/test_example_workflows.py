"""The example workflows are what their script makes, and have all that ComfyUI shows of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_workflows
import pytest
from comfy_server import ComfyServer
from comfyui_source import DEFAULT_VERSION
from PIL import Image
from workflow_graph import Graph

pytestmark = pytest.mark.comfy


@pytest.fixture
def info(comfy_server: ComfyServer) -> dict[str, Any]:
    return comfy_server.object_info()


def test_files_are_what_the_script_makes(info: dict[str, Any]) -> None:
    """Nodes, values and wires: with this ComfyUI's nodes, of which newer ones have more outputs and other heights."""
    for name, make in make_workflows.WORKFLOWS.items():
        text = (make_workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8")
        assert essence(json.loads(text)) == essence(make(info)), f"{name}: run scripts/make_workflows.py"
    names = {path.stem for path in make_workflows.FOLDER.glob("*.json")}
    assert names == set(make_workflows.WORKFLOWS)


def test_files_are_those_of_the_oldest_comfyui(
    info: dict[str, Any], comfy_server: ComfyServer, root: Path
) -> None:
    if comfy_server.system_stats()["system"]["comfyui_version"] != DEFAULT_VERSION:
        pytest.skip(f"the files are written with ComfyUI {DEFAULT_VERSION}")
    found = [str(path.relative_to(root)) for path in make_workflows.outdated(info)]
    assert found == [], "run: $SNUG_PYTHON scripts/make_workflows.py"


def essence(workflow: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    nodes = [(node["type"], node.get("title"), node["widgets_values"]) for node in workflow["nodes"]]
    return nodes, workflow["links"]


def test_unknown_nodes_and_inputs_are_refused(info: dict[str, Any]) -> None:
    graph = Graph(info)
    with pytest.raises(KeyError, match="NoSuchNode"):
        graph.add("NoSuchNode", 0)
    with pytest.raises(KeyError, match="KSampler has no input sede"):
        graph.add("KSampler", 0, sede=1)


@pytest.mark.parametrize("name", sorted(make_workflows.WORKFLOWS))
def test_each_has_a_picture_a_note_and_only_nodes_of_comfyui_and_snug(
    name: str, info: dict[str, Any]
) -> None:
    path = make_workflows.FOLDER / f"{name}.json"
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    (note,) = [node for node in nodes if node["type"] == "MarkdownNote"]
    assert (
        note["widgets_values"][0].startswith("## ")
        and "](https://huggingface.co/" in note["widgets_values"][0]
    )
    packs = {info[node["type"]]["python_module"] for node in nodes if node is not note}
    assert {pack for pack in packs if pack.startswith("custom_nodes.")} == {"custom_nodes.ComfyUI-Snug"}
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and picture.width >= 400
    assert path.with_suffix(".jpg").stat().st_size < 60_000
