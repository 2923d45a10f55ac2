"""Snug's memory panel in a page, as a test sees and uses it."""

from __future__ import annotations

from typing import Any

from comfy_page import ComfyPage
from playwright.sync_api import Locator, expect

TAB = "snug.memory"
SIDEBAR = "window.app.extensionManager.sidebarTab"


def part(name: str) -> str:
    return f'[data-snug="{name}"]'


class MemoryPanel:
    """The panel of one tab; what it shows is read from the page, never from the server."""

    def __init__(self, comfy: ComfyPage) -> None:
        self.comfy = comfy
        self.page = comfy.page
        self.root = self.page.locator(part("panel"))

    # ---- opening and closing ---------------------------------------------------------------------------------------

    def open(self) -> MemoryPanel:
        """By its button in the sidebar, as people do."""
        self.page.locator(f".{TAB.replace('.', chr(92) + '.')}-tab-button").click()
        return self.wait_until_live()

    def close(self) -> None:
        self.page.evaluate(f"() => {SIDEBAR}.toggleSidebarTab('{TAB}')")
        expect(self.root).to_have_count(0)

    def wait_until_live(self, seconds: float = 20.0) -> MemoryPanel:
        expect(self.root).to_have_attribute("data-connection", "live", timeout=1000 * seconds)
        return self

    # ---- what it shows ---------------------------------------------------------------------------------------------

    def find(self, name: str) -> Locator:
        return self.root.locator(part(name))

    def prompt_id(self) -> str | None:
        return self.root.locator("[data-prompt-id]").first.get_attribute("data-prompt-id")

    def wait_for_prompt(self, prompt_id: str, nodes: int) -> None:
        """Until the table has this many nodes of the prompt, all of which have ended."""
        expect(self.root.locator(f'[data-prompt-id="{prompt_id}"]')).to_have_count(1, timeout=15_000)
        expect(self.find("node-row")).to_have_count(nodes, timeout=15_000)
        done = self.root.locator(f'{part("node-row")}[data-state="done"]')
        expect(done).to_have_count(nodes, timeout=15_000)

    def node_peaks(self) -> list[tuple[str, int]]:
        """(node id, peak in bytes) in the order of the table."""
        rows = self.find("node-row").all()
        return [(_text(row, "data-node-id"), int(_text(row, "data-bytes"))) for row in rows]

    def node_titles(self) -> list[str]:
        return self.find("node-row").locator("th button").all_inner_texts()

    def lanes(self) -> dict[str, str]:
        """State of each node's bar in the timeline, by node id."""
        bars = self.find("timeline").locator("[data-node-id][data-state]").all()
        return {_text(bar, "data-node-id"): _text(bar, "data-state") for bar in bars}

    def parts(self, device: str) -> dict[str, int]:
        """Bytes of each part in the device's bar."""
        bar = self.root.locator(f'{part("device-bar")}[data-device="{device}"]')
        return {
            _text(found, "data-part"): int(_text(found, "data-bytes"))
            for found in bar.locator("[data-part]").all()
        }

    def total(self, device: str) -> int:
        return int(
            _text(self.root.locator(f'{part("device-bar")}[data-device="{device}"]').first, "data-total")
        )

    def models(self) -> dict[str, dict[str, Any]]:
        """What each model's row says, by the model's name."""
        rows = self.find("model-row").all()
        sizes = ("data-bytes", "data-offloaded", "data-pinned", "data-total")
        return {
            _text(row, "data-name"): {name.removeprefix("data-"): int(_text(row, name)) for name in sizes}
            for row in rows
        }

    def overflows(self) -> bool:
        """Whether something sticks out of the panel sideways."""
        return self.root.evaluate("panel => panel.scrollWidth > panel.clientWidth + 1")


def _text(locator: Locator, attribute: str) -> str:
    value = locator.get_attribute(attribute)
    assert value is not None, f"{attribute} is missing"
    return value
