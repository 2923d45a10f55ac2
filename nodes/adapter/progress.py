"""ComfyUI's progress bar for work that is counted in steps."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.utils


def progress_of(steps: int) -> Callable[[], None]:
    """A function to be called after each step; it raises ComfyUI's exception when the user has pressed cancel."""
    bar = comfy.utils.ProgressBar(max(1, steps))

    def step() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return step
