"""The page's own files: after an update of the pack a browser must not go on with those that it kept."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

# ComfyUI serves a pack's files below the name of its folder.
_PLACE = f"/extensions/{Path(__file__).parents[2].name}/"


def register(app: web.Application) -> None:
    app.on_response_prepare.append(_ask_again)


async def _ask_again(request: web.Request, response: web.StreamResponse) -> None:
    """ComfyUI has browsers ask each time whether a .js file has changed. Snug's .mjs files go with it."""
    if request.path.endswith(".mjs") and request.path.startswith(_PLACE):
        response.headers.setdefault("Cache-Control", "no-cache")
