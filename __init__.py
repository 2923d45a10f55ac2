"""ComfyUI-Snug: big diffusion models that fit and run fast.

Everything is imported inside `comfy_entrypoint`, so that merely importing the pack (test runners and scanners
do) needs neither torch nor ComfyUI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI once while it loads custom nodes."""
    from .nodes import create_extension

    return create_extension()
