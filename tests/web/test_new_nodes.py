"""Nodes as they are when somebody has just added them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from comfy_page import ComfyPage
from comfy_server import ComfyServer, WorkflowError

pytestmark = [pytest.mark.comfy, pytest.mark.page]

ADD = """() => {
    const { graph } = window.app;
    const loader = LiteGraph.createNode("SnugLoadCalibration"), shown = LiteGraph.createNode("PreviewAny");
    graph.clear();
    graph.add(loader);
    graph.add(shown);
    loader.connect(1, shown, 0);
}"""
CHOSEN = "() => window.app.graph.nodes.find(node => node.type === 'SnugLoadCalibration').widgets[0].value"


# The size of a new node, and the least that its widgets need, before the page has drawn it.
SIZES = """type => {
    const { graph } = window.app;
    graph.clear();
    const node = LiteGraph.createNode(type);
    graph.add(node);
    return [...node.size, ...node.computeSize()];
}"""


def test_there_is_room_for_what_they_show(open_page: Callable[..., ComfyPage]) -> None:
    """Otherwise it hangs out of the node until the page draws it again."""
    page = open_page("dark", "classic").page
    for node in ("SnugVRAMMonitor", "SnugCompareImages", "SnugBlindTest"):
        width, height, least_width, least_height = page.evaluate(SIZES, node)
        assert width >= least_width and height >= least_height, node


def test_a_combo_without_files_says_where_they_belong_and_takes_the_first(
    open_page: Callable[..., ComfyPage], page_server: ComfyServer
) -> None:
    folder = page_server.base / "models" / "snug_calibrations"
    folder.mkdir(exist_ok=True)
    page = open_page().page
    page.evaluate(ADD)
    assert page.evaluate(CHOSEN) == "no files in models/snug_calibrations"
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    with pytest.raises(WorkflowError, match=r"There was no calibration to choose in .*press R"):
        page_server.run(prompt)
    (folder / "first.safetensors").touch()
    try:
        page.keyboard.press("r")
        page.wait_for_function(f"() => ({CHOSEN})() === 'first.safetensors'")
    finally:
        (folder / "first.safetensors").unlink()
