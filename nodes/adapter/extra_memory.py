"""Memory that Snug keeps on a device for a loaded model beyond its weights, counted in what ComfyUI believes is loaded.

So ComfyUI asks for it back, from the patcher, when it needs memory (`PackedPatcher.partially_unload`).
"""

from __future__ import annotations

from typing import Any

# Attribute of the model: bytes that are counted, by what for.
_EXTRA = "snug_extra_bytes"


def count_extra(model: Any, what: str, nbytes: int) -> None:
    """Counts `nbytes` for `what`, in place of what was counted for it before."""
    counted: dict[str, int] = model.__dict__.setdefault(_EXTRA, {})
    model.model_loaded_weight_memory += nbytes - counted.get(what, 0)
    counted[what] = nbytes


def extra_bytes(model: Any, what: str) -> int:
    return model.__dict__.get(_EXTRA, {}).get(what, 0)


def forget_extra(model: Any) -> None:
    """ComfyUI has counted anew, without any of it."""
    model.__dict__.pop(_EXTRA, None)
