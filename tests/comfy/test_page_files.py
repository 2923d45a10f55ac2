"""The page's files as a running server gives them."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from comfy_server import ComfyServer

pytestmark = pytest.mark.comfy

PLACE = "/extensions/ComfyUI-Snug"


def test_only_the_entry_is_an_extension(comfy_server: ComfyServer) -> None:
    listed = [path for path in comfy_server.json("/extensions") if path.startswith(PLACE)]
    assert listed == [f"{PLACE}/snug.js"]


def test_scripts_are_served_as_such_and_never_taken_from_a_cache(
    comfy_server: ComfyServer, root: Path
) -> None:
    found = [path for path in (root / "web").rglob("*") if path.suffix in (".js", ".mjs", ".css")]
    files = [path.relative_to(root / "web").as_posix() for path in found]
    assert len(files) > 20
    for file in files:
        with urllib.request.urlopen(f"{comfy_server.url}{PLACE}/{file}") as answer:
            kind = answer.headers["Content-Type"].partition(";")[0]
            assert kind in (
                ("text/css",) if file.endswith("css") else ("text/javascript", "application/javascript")
            )
            assert answer.headers["Cache-Control"] in ("no-cache", "no-store"), file
