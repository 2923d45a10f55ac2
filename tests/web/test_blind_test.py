"""Blind Test in the page of a real ComfyUI: voting, the result, and what survives."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_page import ComfyPage, Renderer, Theme
from comfy_server import ComfyServer
from memory_panel import part
from PIL import Image
from playwright.sync_api import Locator, expect

pytestmark = [pytest.mark.comfy, pytest.mark.page, pytest.mark.slow]

OpenPage = Callable[..., ComfyPage]
NODE = "SnugBlindTest"
TRIALS = 6


@pytest.fixture(scope="module")
def workflow(page_server: ComfyServer) -> Callable[[int], dict[str, Any]]:
    """workflow(round): two pairs; the quantized ones are darker."""
    for name, level in (("reference", 200), ("quantized", 60)):
        for number, colour in enumerate(((level, 30, 30), (30, level, 30))):
            Image.new("RGB", (64, 64), colour).save(page_server.base / "input" / f"blind_{name}_{number}.png")

    def make(round: int) -> dict[str, Any]:
        nodes: dict[str, Any] = {}
        for name in ("reference", "quantized"):
            for number in range(2):
                inputs: dict[str, Any] = {"image": f"blind_{name}_{number}.png"}
                nodes[f"{name} {number}"] = {"class_type": "LoadImage", "inputs": inputs}
            both = {"image1": [f"{name} 0", 0], "image2": [f"{name} 1", 0]}
            nodes[name] = {"class_type": "ImageBatch", "inputs": both}
        inputs = {"reference": ["reference", 0], "quantized": ["quantized", 0]}
        settings = {"name": "Q4_K", "trials": TRIALS, "round": round}
        return {**nodes, "test": {"class_type": NODE, "inputs": {**inputs, **settings}}}

    return make


def begin(page: ComfyPage, workflow: dict[str, Any]) -> Locator:
    page.load_api(workflow)
    page.server.wait(page.queue())
    element = page.page.locator(part("blind"))
    page.look_at(NODE)
    expect(element.locator(part("question"))).to_have_text(f"Pair 1 of {TRIALS}: which one is Q4_K?")
    return element


def darker_side(element: Locator) -> int:
    """1 or 2: where the darker picture is, as people see it."""
    levels = element.locator("img.snug-content").evaluate_all(
        """async images => {
            const levels = [];
            for (const image of images) {
                await image.decode();
                const canvas = new OffscreenCanvas(1, 1);
                const context = canvas.getContext("2d");
                context.drawImage(image, 0, 0);
                levels.push(Math.max(...context.getImageData(0, 0, 1, 1).data.slice(0, 3)));
            }
            return levels;
        }"""
    )
    return 1 + levels.index(min(levels))


def saved_round(page: ComfyPage) -> dict[str, Any]:
    """The page's node state: what somebody can read who looks into the workflow."""
    return page.page.evaluate(
        f"() => app.canvas.graph.nodes.find(node => node.type === '{NODE}').properties.snug_blind"
    )


@pytest.mark.parametrize(("theme", "renderer"), [("light", "classic"), ("dark", "nodes2")])
def test_a_round(
    open_page: OpenPage,
    workflow: Callable[[int], dict[str, Any]],
    screenshots: Path,
    theme: Theme,
    renderer: Renderer,
) -> None:
    """Votes by key and by click, kept through a reload; the result, and a new start."""
    page = open_page(theme, renderer)
    page.set_setting("Comfy.Workflow.Persist", True)
    element = begin(page, workflow(1 if renderer == "classic" else 2))
    page.center(element)
    page.screenshot(screenshots / f"blind-{theme}-{renderer}.png")
    assert saved_round(page)["quantized"] is None
    stage = element.locator(part("stage"))
    stage.focus()
    right = 0
    for trial in range(1, TRIALS + 1):
        question = element.locator(part("question"))
        expect(question).to_contain_text(f"Pair {trial} of")
        side = darker_side(element)
        if trial == 3:
            element.get_by_role("button", name="3: cannot tell").click()
            stage.focus()
        elif trial == 4:
            page.page.keyboard.press(str(3 - side))  # the wrong one
        else:
            page.page.keyboard.press(str(side))
            right += 1
        if trial == 2 and renderer == "classic":
            expect(question).to_contain_text("Pair 3 of")
            page.page.wait_for_timeout(1000)  # the page saves workflows a little later
            page.reload()
            expect(question).to_contain_text("Pair 3 of")
            page.look_at(NODE)
            stage.focus()
    result = element.locator(part("result"))
    expect(result).to_contain_text("You found Q4_K 4 of 5 times; by guessing this happens in 18.8% of tries.")
    expect(result).to_contain_text("In 1 more you could not tell")
    assert right == 4
    expect(element.locator(part("question"))).to_contain_text("you found it")
    page.screenshot(screenshots / f"blind-result-{theme}-{renderer}.png")
    known = saved_round(page)
    file = page.server.base / "output" / known["file"]
    assert json.loads(file.read_text(encoding="utf-8"))["result"] == known["result"]

    element.evaluate("element => { element.style.width = '260px'; }")
    assert element.evaluate("element => element.scrollWidth <= element.clientWidth + 1")
    element.get_by_role("button", name="Start again").click()
    assert json.loads(file.read_text(encoding="utf-8"))["finished"], "the first click only asks"
    element.get_by_role("button", name=f"Forget {TRIALS} votes?").click()
    expect(element.locator(part("question"))).to_have_text(f"Pair 1 of {TRIALS}: which one is Q4_K?")
    assert json.loads(file.read_text(encoding="utf-8"))["result"] is None


def test_requests_that_are_refused(
    page_server: ComfyServer, workflow: Callable[[int], dict[str, Any]]
) -> None:
    (shown,) = page_server.run(workflow(3))["test"]["snug_blind"]
    page_server.json("/snug/blind_test/vote", {"round": shown["round"], "trial": 0, "vote": 1})
    known = page_server.json(f"/snug/blind_test/round?round={shown['round']}")
    assert known["votes"] == [1, *[None] * (TRIALS - 1)] and known["quantized"] is None
    bad = [
        ("vote", {"round": shown["round"], "trial": TRIALS, "vote": 1}, 422),
        ("vote", {"round": shown["round"], "trial": 0, "vote": 3}, 400),
        ("vote", {"round": shown["round"], "trial": True, "vote": 1}, 400),
        ("vote", {"round": "../../x", "trial": 0, "vote": 1}, 404),
        ("finish", {}, 400),
        ("restart", {"round": "20200101-000000-00000000"}, 404),
    ]
    for action, body, status in bad:
        with pytest.raises(urllib.error.HTTPError) as caught:
            page_server.json(f"/snug/blind_test/{action}", body)
        assert caught.value.code == status
        assert json.loads(caught.value.read())["error"].endswith(".")
