"""The memory panel while a workflow runs, in the page of a real ComfyUI."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_page import ComfyPage, Renderer, Theme
from comfy_server import ComfyServer
from memory_panel import MemoryPanel, part
from playwright.sync_api import expect

pytestmark = [pytest.mark.comfy, pytest.mark.page, pytest.mark.slow]

OpenPage = Callable[..., ComfyPage]
NODES = 12  # of the example workflow: the monitor leaves itself out


def recorded(server: ComfyServer, prompt_id: str) -> dict[str, Any]:
    """What the server knows of a prompt."""
    prompts = server.json("/snug/telemetry/history")["prompts"]
    return next(prompt for prompt in prompts if prompt["prompt_id"] == prompt_id)


def peaks(prompt: dict[str, Any]) -> list[tuple[str, int]]:
    """As the table shows them: the highest first."""
    found = [(node["node_id"], node["peak"][prompt["device"]]) for node in prompt["nodes"]]
    return sorted(found, key=lambda entry: -entry[1])


def run_example(page: ComfyPage, panel: MemoryPanel, example: dict[str, Any]) -> str:
    """Runs the example until the panel shows that all of its nodes are done; returns the prompt's id."""
    page.load_graph(example)
    for _ in range(3):
        page.server.free()  # so that every node runs
        for _ in range(50):  # the server does so when it is done with what it ran before
            page.page.wait_for_timeout(200)
            if not page.server.json("/snug/telemetry/snapshot")["models"]:
                break
        page.page.wait_for_timeout(300)
        prompt_id = page.queue()
        if not cached_nodes(page.server.wait(prompt_id)):
            break
    panel.wait_for_prompt(prompt_id, NODES)
    return prompt_id


def cached_nodes(entry: dict[str, Any]) -> list[str]:
    """Of a prompt in the server's history: those that did not run, as it had their results."""
    return dict(entry["status"]["messages"])["execution_cached"]["nodes"]


@pytest.mark.parametrize(
    ("theme", "renderer"),
    [("dark", "classic"), ("dark", "nodes2"), ("light", "classic"), ("light", "nodes2")],
)
def test_a_run(
    open_page: OpenPage, example: dict[str, Any], screenshots: Path, theme: Theme, renderer: Renderer
) -> None:
    """Bars, lanes, table and models show the true names and numbers."""
    page = open_page(theme, renderer)
    panel = MemoryPanel(page).open()
    prompt_id = run_example(page, panel, example)
    known = recorded(page.server, prompt_id)
    assert sorted(panel.node_peaks()) == sorted(peaks(known))
    shown = [peak for _, peak in panel.node_peaks()]
    assert shown == sorted(shown, reverse=True)
    titles = {title.rpartition(" #")[0] for title in panel.node_titles()}
    assert {"Load Diffusion Model (Snug)", "Prompt", "KSampler", "VAE Decode"} <= titles
    lanes = panel.lanes()
    assert set(lanes) == {node["node_id"] for node in known["nodes"]} and set(lanes.values()) == {"done"}
    peak = panel.find("timeline").locator("[data-peak]")
    assert int(peak.get_attribute("data-peak") or 0) == peaks(known)[0][1]
    assert peak.get_attribute("data-node-id") == peaks(known)[0][0]

    parts = panel.parts("cpu")
    assert sum(parts.values()) == panel.total("cpu")
    assert parts["weights"] > 0
    models = {model["name"]: model for model in page.server.json("/snug/telemetry/snapshot")["models"]}
    # Between prompts there is a sample each second.
    expect(panel.find("model-row")).to_have_count(len(models), timeout=10_000)
    shown_models = panel.models()
    assert set(shown_models) == set(models) and "Flux" in models
    assert shown_models["Flux"]["bytes"] == models["Flux"]["on_device"]
    assert shown_models["Flux"]["total"] == models["Flux"]["total"]
    page.screenshot(screenshots / f"workflow-{theme}-{renderer}.png")
    page.look_at("SnugVRAMMonitor")
    monitor = page.page.locator(part("monitor"))
    expect(monitor).to_be_visible()
    expect(monitor).to_have_attribute("data-bytes", re.compile(r"\d+"))
    assert int(monitor.get_attribute("data-bytes") or 0) in dict(peaks(known)).values()
    page.screenshot(screenshots / f"panel-{theme}-{renderer}.png")


def test_theme_and_renderer_change_while_it_is_open(open_page: OpenPage, example: dict[str, Any]) -> None:
    page = open_page("dark", "classic")
    panel = MemoryPanel(page).open()
    run_example(page, panel, example)
    text = "panel => getComputedStyle(panel).color"
    dark = panel.root.evaluate(text)
    before = panel.node_peaks()
    page.set_theme("light")
    page.page.wait_for_function(
        "before => getComputedStyle(document.querySelector('[data-snug=panel]')).color !== before", arg=dark
    )
    for renderer in ("nodes2", "classic"):
        page.set_renderer(renderer)
        page.look_at("SnugVRAMMonitor")
        expect(page.page.locator(part("monitor"))).to_be_visible()
    assert panel.node_peaks() == before


def test_unloading_a_model(open_page: OpenPage, example: dict[str, Any]) -> None:
    page = open_page()
    panel = MemoryPanel(page).open()
    run_example(page, panel, example)
    assert "Flux" in panel.models()
    row = panel.find("model-row").filter(has_text="Flux").first
    row.locator(part("unload")).click()
    expect(panel.find("model-row")).to_have_count(0, timeout=15_000)
    assert page.server.json("/snug/telemetry/snapshot")["models"] == []


def test_export(open_page: OpenPage, example: dict[str, Any], tmp_path: Path) -> None:
    """The file that is downloaded and the one that the server writes have the server's numbers."""
    page = open_page()
    panel = MemoryPanel(page).open()
    prompt_id = run_example(page, panel, example)
    known = recorded(page.server, prompt_id)
    export = panel.find("export")
    export.locator("select").select_option("json")
    with page.page.expect_download() as download:
        export.locator('[data-action="download"]').click()
    download.value.save_as(tmp_path / "memory.json")
    found = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    assert found["nodes"] == known["nodes"]
    export.locator('[data-action="save"]').click()
    page.page.wait_for_function("() => document.querySelector('[data-snug=export]').dataset.path")
    path = page.server.base / "output" / str(export.get_attribute("data-path"))
    assert json.loads(path.read_text(encoding="utf-8"))["nodes"] == known["nodes"]


def test_diagnostics_are_copied(open_page: OpenPage) -> None:
    page = open_page()
    panel = MemoryPanel(page).open()
    panel.find("diagnostics").click()
    text = ""
    for _ in range(100):
        page.page.wait_for_timeout(100)
        text = page.page.evaluate("() => navigator.clipboard.readText()")
        if text:
            break
    found = json.loads(text)
    assert {"versions", "devices", "backends"} <= set(found)
    assert str(Path.home()) not in text
