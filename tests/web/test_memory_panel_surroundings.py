"""The memory panel and what happens around it: reloads, several tabs, a server that starts anew, subgraphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from comfy_page import ComfyPage
from comfy_server import ComfyServer
from memory_panel import MemoryPanel, part
from playwright.sync_api import Request, expect

pytestmark = [pytest.mark.comfy, pytest.mark.page, pytest.mark.slow]

OpenPage = Callable[..., ComfyPage]
_tags = itertools.count(1)


def taking(seconds: float, count: int = 1, megabytes: int = 16) -> dict[str, Any]:
    """A workflow of nodes one after the other, each of which takes memory for some seconds."""
    nodes: dict[str, Any] = {}
    for number in range(1, count + 1):
        inputs: dict[str, Any] = {"megabytes": megabytes * number, "seconds": seconds, "tag": next(_tags)}
        inputs |= {"after": [str(number - 1), 0]} if number > 1 else {}
        title = {"title": f"Take {number}"}
        nodes[str(number)] = {"class_type": "SnugTestAllocate", "inputs": inputs, "_meta": title}
    nodes["99"] = {"class_type": "PreviewAny", "inputs": {"source": [str(count), 0]}}
    return nodes


def snapshot(server: ComfyServer) -> dict[str, Any]:
    return server.json("/snug/telemetry/snapshot")


def wait_until_sampling_is(page: ComfyPage, wanted: bool, seconds: float = 20.0) -> None:
    for _ in range(round(seconds / 0.2)):
        if snapshot(page.server)["is_sampling"] is wanted:
            return
        page.page.wait_for_timeout(200)
    pytest.fail(f"sampling is not {wanted} after {seconds} s")


def test_reload_in_the_middle_of_a_run(open_page: OpenPage) -> None:
    page = open_page()
    panel = MemoryPanel(page).open()
    workflow = taking(0.5, count=2)
    workflow["2"]["inputs"]["seconds"] = 120.0
    page.load_api(workflow)
    prompt_id = page.queue()
    second = panel.root.locator(f'{part("node-row")}[data-node-id="2"]')
    expect(second).to_have_attribute("data-state", "running", timeout=20_000)
    page.reload()
    panel.wait_until_live()
    assert panel.prompt_id() == prompt_id
    expect(second).to_have_attribute("data-state", "running")
    page.server.interrupt()
    expect(second).to_have_attribute("data-state", "stopped", timeout=20_000)
    assert panel.lanes() == {"1": "done", "2": "stopped"}


def test_two_tabs_and_none(open_page: OpenPage) -> None:
    """Each tab is told; when the last panel is closed, nothing is sampled, asked for or drawn any more."""
    first, second = open_page(), open_page()
    panels = [MemoryPanel(page).open() for page in (first, second)]
    first.load_api(taking(0.5))
    prompt_id = first.queue()
    first.server.wait(prompt_id)
    for panel in panels:
        panel.wait_for_prompt(prompt_id, nodes=2)
    assert panels[0].node_peaks() == panels[1].node_peaks()
    requests: list[str] = []
    note: Callable[[Request], None] = lambda request: requests.append(request.url)  # noqa: E731
    for page, panel in zip((first, second), panels, strict=True):
        panel.close()
        page.page.on("request", note)
    wait_until_sampling_is(first, False)
    requests.clear()
    first.page.wait_for_timeout(3000)
    assert [url for url in requests if "/snug/" in url] == []


def test_server_that_starts_anew(open_page: OpenPage, page_server: ComfyServer) -> None:
    page = open_page()
    panel = MemoryPanel(page).open()
    page_server.stop()
    expect(panel.root).not_to_have_attribute("data-connection", "live", timeout=20_000)
    page_server.start()
    panel.wait_until_live(seconds=40)
    page.load_api(taking(0.3))
    prompt_id = page.queue()
    page_server.wait(prompt_id)
    panel.wait_for_prompt(prompt_id, nodes=2)


def test_node_in_a_subgraph_is_shown(open_page: OpenPage) -> None:
    page = open_page()
    panel = MemoryPanel(page).open()
    page.load_api(taking(0.2, count=2))
    page.page.evaluate(
        """() => {
            const graph = app.canvas.graph;
            const inside = graph.nodes.filter(node => node.type === "SnugTestAllocate");
            graph.convertToSubgraph(new Set(inside));
        }"""
    )
    prompt_id = page.queue()
    page.server.wait(prompt_id)
    panel.wait_for_prompt(prompt_id, nodes=3)
    ids = [node_id for node_id, _ in panel.node_peaks()]
    inner = next(node_id for node_id in ids if ":" in node_id)
    row = panel.root.locator(f'[data-snug="node-row"][data-node-id="{inner}"] button')
    row.focus()
    page.page.keyboard.press("Enter")
    page.page.wait_for_function("() => app.canvas.graph !== (app.rootGraph ?? app.graph)", timeout=5000)
    shown = page.page.evaluate(
        """id => {
            const node = app.canvas.graph.getNodeById(id) ?? app.canvas.graph.getNodeById(Number(id));
            const [x, y, width, height] = app.canvas.ds.visible_area;
            const [left, top] = node.pos;
            return left >= x && top >= y && left <= x + width && top <= y + height;
        }""",
        inner.rpartition(":")[2],
    )
    assert shown


def test_narrow_panel_and_keyboard(open_page: OpenPage) -> None:
    page = open_page(size=(1000, 900))
    panel = MemoryPanel(page).open()
    page.load_api(taking(0.2, count=2, megabytes=64))
    prompt_id = page.queue()
    page.server.wait(prompt_id)
    panel.wait_for_prompt(prompt_id, nodes=3)
    panel.root.evaluate("panel => { panel.style.width = '260px'; }")
    page.page.wait_for_timeout(300)
    assert not panel.overflows()
    # The table is sorted by its headers, with the keyboard alone.
    header = panel.root.get_by_role("columnheader", name="Node").get_by_role("button")
    header.focus()
    page.page.keyboard.press("Enter")
    expect(panel.root.get_by_role("columnheader", name="Node")).to_have_attribute("aria-sort", "ascending")
    titles = panel.node_titles()
    assert titles == sorted(titles)
    outline = header.evaluate("button => getComputedStyle(button).outlineStyle")
    assert outline != "none", "the focus cannot be seen"
    assert panel.root.get_by_role("table").count() >= 1
