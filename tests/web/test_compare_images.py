"""Compare Images in the page of a real ComfyUI: what people see and do with pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_page import ComfyPage, Renderer, Theme
from comfy_server import ComfyServer
from memory_panel import part
from PIL import Image, ImageDraw
from playwright.sync_api import Locator, expect

pytestmark = [pytest.mark.comfy, pytest.mark.page, pytest.mark.slow]

OpenPage = Callable[..., ComfyPage]
NODE = "SnugCompareImages"
RED, BLUE = (200, 30, 30), (30, 30, 200)
SIZE = 96
CAPTIONS = "dense, 10.2 s\nQ8_0, 5.1 s\nQ4_K, 4.8 s"


@pytest.fixture(scope="module")
def pictures(page_server: ComfyServer) -> dict[str, str]:
    """A red and a blue one, the red one with a square of another colour in its corner, and one of another size."""
    folder = page_server.base / "input"
    changed = Image.new("RGB", (SIZE, SIZE), RED)
    ImageDraw.Draw(changed).rectangle((0, 0, SIZE // 4, SIZE // 4), fill=(230, 60, 60))
    images = {
        "red": Image.new("RGB", (SIZE, SIZE), RED),
        "blue": Image.new("RGB", (SIZE, SIZE), BLUE),
        "changed": changed,
        "small": Image.new("RGB", (SIZE // 2, SIZE // 2), BLUE),
    }
    for name, image in images.items():
        image.save(folder / f"compare_{name}.png")
    return {name: f"compare_{name}.png" for name in images}


def comparing(*names: str, captions: str = CAPTIONS) -> dict[str, Any]:
    workflow: dict[str, Any] = {
        str(number): {"class_type": "LoadImage", "inputs": {"image": name}}
        for number, name in enumerate(names, 1)
    }
    inputs: dict[str, Any] = {f"image_{number}": [str(number), 0] for number in range(1, len(names) + 1)}
    return {**workflow, "9": {"class_type": NODE, "inputs": {**inputs, "captions": captions}}}


def run(page: ComfyPage, workflow: dict[str, Any]) -> Locator:
    """The node's own part of the page, with pictures in it."""
    page.load_api(workflow)
    page.server.wait(page.queue())
    page.look_at(NODE)
    element = page.page.locator(part("compare"))
    expect(element.locator(part("stage"))).to_be_visible()
    return element


def choose(element: Locator, mode: str) -> None:
    element.locator(f'button[data-mode="{mode}"]').click()
    expect(element.locator(part("stage"))).to_have_attribute("data-mode", mode)


def scales(element: Locator) -> list[float]:
    """How many pixels of the page one of each picture takes."""
    return element.locator(".snug-content").evaluate_all(
        "all => all.map(one => new DOMMatrix(getComputedStyle(one).transform).a)"
    )


def colour_at(element: Locator, share: float) -> str:
    """Of the middle line of a pane, at this share of its width, as people see it."""
    image = Image.open(io.BytesIO(element.locator(".snug-pane").screenshot())).convert("RGB")
    red, _, blue = image.getpixel((round(share * image.width), round(0.75 * image.height)))  # type: ignore[misc]
    return "red" if red > blue else "blue"


@pytest.mark.parametrize(("theme", "renderer"), [("dark", "classic"), ("light", "nodes2")])
def test_modes(
    open_page: OpenPage, pictures: dict[str, str], screenshots: Path, theme: Theme, renderer: Renderer
) -> None:
    page = open_page(theme, renderer)
    element = run(page, comparing(pictures["red"], pictures["blue"], pictures["changed"]))
    stage = element.locator(part("stage"))
    expect(element.locator(".snug-label b")).to_have_text(
        ["1. dense, 10.2 s", "2. Q8_0, 5.1 s", "3. Q4_K, 4.8 s"]
    )
    expect(element.locator(".snug-label span").nth(1)).to_have_text(
        re.compile(r"PSNR \d+\.\d dB, SSIM \d\.\d+")
    )
    page.screenshot(screenshots / f"compare-{theme}-{renderer}.png")

    # The wheel zooms all of them, around what is under the pointer.
    before = scales(element)
    pane = element.locator(".snug-pane").nth(1)
    pane.click()
    page.page.mouse.wheel(0, -300)
    expect(stage.locator("xpath=..").locator(".snug-count", has_text="2×")).to_be_visible()
    after = scales(element)
    assert len(after) == 3 and all(
        new == pytest.approx(2 * old, rel=0.05) for new, old in zip(after, before, strict=True)
    )
    pane.dblclick()
    assert scales(element) == pytest.approx(before)

    choose(element, "slider")
    for share in (0.3, 0.7):
        box = element.locator(".snug-pane").bounding_box()
        handle = element.locator(part("handle")).bounding_box()
        assert box and handle
        middle = handle["y"] + handle["height"] / 2
        page.page.mouse.move(handle["x"] + handle["width"] / 2, middle)
        page.page.mouse.down()
        page.page.mouse.move(box["x"] + share * box["width"], middle, steps=3)
        page.page.mouse.up()
        # The pictures are as wide as the pane is high: its middle is all picture.
        seen = [colour_at(element, at) for at in (0.4, 0.6)]
        assert seen == (["blue", "blue"] if share < 0.5 else ["red", "red"])
    page.screenshot(screenshots / f"compare-slider-{theme}-{renderer}.png")

    choose(element, "difference")
    element.get_by_label("Second image").select_option(index=2)
    expect(element.locator(part("told"))).to_contain_text("of the pixels differ")
    corner, middle = element.locator("canvas").evaluate(
        """canvas => [[4, 4], [60, 60]].map(([x, y]) =>
            [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3))"""
    )
    assert sum(corner) > 300 and sum(middle) < 10
    page.screenshot(screenshots / f"compare-difference-{theme}-{renderer}.png")


def test_keyboard_then_another_size_in_a_narrow_node(open_page: OpenPage, pictures: dict[str, str]) -> None:
    page = open_page()
    workflow = comparing(pictures["red"], pictures["blue"])
    page.page.emulate_media(reduced_motion="reduce")
    element = run(page, workflow)
    stage = element.locator(part("stage"))
    before = scales(element)
    stage.focus()
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Shift+Tab")
    assert (
        stage.evaluate("stage => stage.matches(':focus-visible') && getComputedStyle(stage).outlineStyle")
        == "solid"
    )
    page.page.keyboard.press("+")
    page.page.keyboard.press("ArrowRight")
    assert scales(element) == pytest.approx([1.25 * scale for scale in before])
    page.page.keyboard.press("0")
    page.page.keyboard.press("s")
    expect(stage).to_have_attribute("data-mode", "slider")
    handle = element.locator(part("handle"))
    handle.focus()
    for _ in range(5):
        page.page.keyboard.press("ArrowLeft")
    expect(handle).to_have_attribute("aria-valuenow", "40")
    stage.focus()
    page.page.keyboard.press("b")
    # Reduced motion: nothing blinks until somebody wants it.
    expect(stage).to_have_attribute("data-up", "0")
    page.page.wait_for_timeout(1000)
    expect(stage).to_have_attribute("data-up", "0")
    page.page.keyboard.press("Space")
    expect(stage).to_have_attribute("data-up", "1")
    element.get_by_role("button", name="Start or stop blinking").click()
    expect(stage).to_have_attribute("data-up", "0", timeout=3000)
    page.page.keyboard.press("Delete")
    assert page.page.evaluate("() => app.canvas.graph.nodes.length") == len(workflow)
    # What the wheel, the arrows and the letters do has a name for those who cannot see it.
    assert "Q8_0" in str(stage.get_attribute("aria-label"))

    # Another size, in a narrow node.
    element = run(page, comparing(pictures["red"], pictures["small"]))
    expect(element.locator(".snug-notes")).to_contain_text("is 48 × 48 pixels and the first 96 × 96")
    one, other = scales(element)
    assert other == pytest.approx(2 * one, rel=1e-3)  # both fill their panes
    for mode in ("slider", "blink", "difference", "grid"):
        choose(element, mode)
        element.evaluate("element => { element.style.width = '260px'; }")
        sticks_out = """element => [...element.querySelectorAll('*')].filter(one => one.offsetParent
            && !one.closest('.snug-pane') && one.offsetLeft + one.offsetWidth > 261).map(one => one.className)"""
        assert element.evaluate(sticks_out) == []
        if mode == "difference":
            expect(element.locator(part("told"))).to_contain_text("choose two of one size")


def test_reload_renderer_subgraph_and_neighbours(open_page: OpenPage, pictures: dict[str, str]) -> None:
    """Two nodes on a page keep their pictures and modes apart, whatever happens to the page."""
    page = open_page()
    page.set_setting("Comfy.Workflow.Persist", True)
    workflow = comparing(pictures["red"], pictures["blue"])
    workflow["8"] = {
        "class_type": NODE,
        "inputs": {"image_1": ["2", 0], "image_2": ["1", 0], "captions": "other"},
    }
    page.load_api(workflow)
    page.server.wait(page.queue())
    elements = page.page.locator(part("compare"))
    first, second = (elements.filter(has_text=text) for text in ("dense", "other"))
    for element in (first, second):
        expect(element.locator(".snug-cell")).to_have_count(2)
    page.look_at(NODE)
    first.locator('button[data-mode="slider"]').dispatch_event("click")
    expect(second.locator(part("stage"))).to_have_attribute("data-mode", "grid")

    page.page.wait_for_timeout(1500)  # the page saves workflows a little later
    page.reload()
    shown = elements.filter(has_text="dense").locator(part("stage"))
    expect(shown).to_have_attribute("data-mode", "slider", timeout=10_000)
    expect(shown.locator(".snug-content")).to_have_count(2)
    natural = "image => image.complete && image.naturalWidth"
    page.page.wait_for_function(f"() => [...document.querySelectorAll('.snug-content')].every({natural})")
    page.set_renderer("nodes2")
    page.look_at(NODE)
    expect(elements.filter(has_text="dense").locator(part("stage"))).to_be_visible()
    page.set_renderer("classic")
    page.page.evaluate(
        f"""() => {{
            const graph = app.canvas.graph;
            const inner = graph.nodes.find(node => node.type === "{NODE}" && node.properties.snug_compare
                .chosen.mode === "slider");
            const {{ node }} = graph.convertToSubgraph(new Set([inner]));
            app.canvas.setGraph(node.subgraph);
        }}"""
    )
    page.look_at(NODE)
    expect(shown).to_have_attribute("data-mode", "slider")
    expect(shown).to_be_visible()
    # ComfyUI deletes its previews when it starts: what the workflow kept leads nowhere then.
    page.page.evaluate(
        """() => {
            const saved = JSON.stringify(app.rootGraph.serialize()).replaceAll("snug_compare_", "snug_gone_");
            return app.loadGraphData(JSON.parse(saved));
        }"""
    )
    expect(elements.filter(has_text="no longer on the server")).to_have_count(2)
