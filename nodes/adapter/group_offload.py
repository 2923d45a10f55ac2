"""Group offloading: a MODEL or CLIP whose blocks come to the GPU group by group, the next while one computes."""

from __future__ import annotations

from typing import Any

from .offload_patcher import ATTACHMENT, adopt_offloading
from .offloading import Offloading, OffloadSettings


def offload_model(patcher: Any, settings: OffloadSettings) -> tuple[Any, str]:
    """(a clone of a MODEL that is streamed, the plan as text).

    Raises SnugError when the model has no blocks, or cannot be run within the limit.
    """
    clone = adopt_offloading(patcher.clone())
    clone.attachments[ATTACHMENT] = Offloading(settings)
    return clone, clone.offload_report()


def offload_clip(clip: Any, settings: OffloadSettings) -> tuple[Any, str]:
    """The same for a CLIP."""
    new = clip.clone()
    new.patcher, report = offload_model(clip.patcher, settings)
    return new, report
