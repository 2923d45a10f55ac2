"""Takes a known amount of memory, for checks of what is recorded about nodes."""

from __future__ import annotations

import time
from typing import Any

import comfy.model_management
import comfy.utils
import torch


class SnugTestAllocate:
    """Holds so many MB (of 2^20 bytes) on ComfyUI's device for `seconds`, with a progress bar, then gives them back.
    No machine has the largest amount.

    tag: any number, so that ComfyUI has no result of it yet. Returns it as text.
    """

    RETURN_TYPES = ("STRING",)
    FUNCTION = "allocate"
    CATEGORY = "snug/tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "megabytes": ("INT", {"default": 256, "min": 0, "max": 2**30}),
                "seconds": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 600.0}),
                "tag": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
            },
            "optional": {"after": ("STRING", {"forceInput": True})},
        }

    def allocate(self, megabytes: int, seconds: float, tag: int, after: str = "") -> tuple[str]:
        device = comfy.model_management.get_torch_device()
        # Written to, as the system gives memory only then.
        values = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
        steps = max(1, round(seconds / 0.05))
        bar = comfy.utils.ProgressBar(steps)
        for _ in range(steps):
            time.sleep(seconds / steps)
            bar.update(1)  # raises when the user interrupts
        del values
        return (f"{after} {tag}".strip(),)
