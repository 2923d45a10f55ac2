"""ComfyUI's web page in a real browser, for tests: opened, given workflows, looked at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from comfy_server import ComfyServer
from playwright.sync_api import Browser, ConsoleMessage, Error, Locator, Page, Playwright, Route, expect

# Without the last ones Chromium looks for its maker's servers at every start.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
WIDTH, HEIGHT = 1400, 900
READY = "() => window.app?.graph && window.app.extensionManager && window.app.rootGraph !== null"
Theme = Literal["dark", "light"]
Renderer = Literal["classic", "nodes2"]


def find_chromium() -> str | None:
    """The browser's program: `$SNUG_CHROMIUM`, or a Chromium or Chrome of the machine."""
    named = os.environ.get("SNUG_CHROMIUM")
    return named or next(filter(None, map(shutil.which, PROGRAMS)), None)


def launch(playwright: Playwright, program: str) -> Browser:
    return playwright.chromium.launch(executable_path=program, args=list(FLAGS), headless=True)


class ComfyPage:
    """One tab. `errors` holds what scripts of the page threw, and what the pack's own scripts logged as errors."""

    def __init__(
        self, browser: Browser, server: ComfyServer, size: tuple[int, int] = (WIDTH, HEIGHT)
    ) -> None:
        self.server = server
        self.errors: list[str] = []
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, accept_downloads=True)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
        self.page: Page = context.new_page()
        self.page.route("**/*", self._local_only)
        self.page.on("pageerror", self._thrown)
        self.page.on("console", self._logged)

    # ---- the page --------------------------------------------------------------------------------------------------

    def open(self, theme: Theme = "dark", renderer: Renderer = "classic") -> None:
        """Loads the page with an empty workflow."""
        self.server.json(
            "/settings",
            {
                "Comfy.TutorialCompleted": True,
                "Comfy.ColorPalette": theme,
                "Comfy.VueNodes.Enabled": renderer == "nodes2",
                "Comfy.Workflow.Persist": False,
            },
        )
        self.page.goto(self.server.url)
        self.wait_until_ready()

    def reload(self) -> None:
        self.page.reload()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        self.page.wait_for_function(READY, timeout=60_000)
        expect(self.page.locator("canvas#graph-canvas, canvas").first).to_be_visible()

    def close(self) -> None:
        self.page.context.close()

    def set_setting(self, name: str, value: Any) -> None:
        """As the settings dialog does."""
        script = "([name, value]) => window.app.extensionManager.setting.set(name, value)"
        self.page.evaluate(script, [name, value])

    def set_theme(self, theme: Theme) -> None:
        self.set_setting("Comfy.ColorPalette", theme)

    def set_renderer(self, renderer: Renderer) -> None:
        self.set_setting("Comfy.VueNodes.Enabled", renderer == "nodes2")

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.mouse.move(WIDTH / 2, HEIGHT - 5)  # no tooltip of what lay under the pointer
        self.page.screenshot(path=path, animations="disabled")

    # ---- workflows -------------------------------------------------------------------------------------------------

    def load_api(self, workflow: Mapping[str, Any]) -> None:
        """A workflow in API format: the page lays its nodes out."""
        self.page.evaluate("workflow => window.app.loadApiJson(workflow, 'test')", workflow)

    def load_graph(self, graph: Mapping[str, Any]) -> None:
        """A workflow as people share it."""
        self.page.evaluate("graph => window.app.loadGraphData(graph)", graph)

    def queue(self) -> str:
        """As the Run button does; returns the prompt's id once the server has taken it."""
        with self.page.expect_response("**/prompt") as answer:
            self.page.evaluate("() => window.app.queuePrompt(0, 1)")
        assert answer.value.ok, answer.value.text()
        return answer.value.json()["prompt_id"]

    def look_at(self, node_type: str) -> None:
        """Brings a node to the middle at full size; the classic renderer hides what is in small ones."""
        self.page.evaluate(
            """type => {
                const { canvas } = window.app;
                canvas.ds.scale = 1;
                canvas.centerOnNode(canvas.graph.nodes.find(node => node.type === type));
                canvas.setDirty(true, true);
            }""",
            node_type,
        )

    def center(self, element: Locator) -> None:
        """Brings what a node shows to the middle by where it is seen: Nodes 2.0 moves nodes of a laid out workflow."""
        box = element.bounding_box()
        size = self.page.viewport_size
        assert box and size
        right, down = (
            (size["width"] - box["width"]) / 2 - box["x"],
            (size["height"] - box["height"]) / 2 - box["y"],
        )
        self.page.evaluate(
            """([right, down]) => {
                const { canvas } = window.app;
                canvas.ds.offset[0] += right / canvas.ds.scale;
                canvas.ds.offset[1] += down / canvas.ds.scale;
                canvas.setDirty(true, true);
            }""",
            [right, down],
        )
        self.page.wait_for_timeout(200)  # the next frames place it

    # ---- what goes wrong -------------------------------------------------------------------------------------------

    def _local_only(self, route: Route) -> None:
        if route.request.url.startswith((self.server.url, "data:", "blob:")):
            route.continue_()
        else:
            route.abort()

    def _thrown(self, error: Error) -> None:
        # ComfyUI's own page throws while it starts; those lines name none of the pack's files.
        if "snug" in (error.stack or "").lower():
            self.errors.append(f"{error.message}\n{error.stack}")

    def _logged(self, message: ConsoleMessage) -> None:
        # The page also asks its maker about every node, which is not let through.
        ours = "/ComfyUI-Snug/" in f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and ours:
            self.errors.append(message.text)
