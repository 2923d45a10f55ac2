"""What the monitor node does."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import numpy as np
import torch

from ...quant_backends.core.errors import SnugError
from .accounting import Sample
from .chart import HEIGHT, WIDTH, draw_timeline
from .export import write_report
from .process import telemetry
from .record import PromptRecord
from .report import as_csv, as_json, report_text, size_text

logger = logging.getLogger("snug")

NOTHING, CSV, JSON = "nothing", "CSV", "JSON"


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the node, as it shows them."""

    reset_peak: bool = False
    free_memory: bool = False
    save_as: str = NOTHING
    filename_prefix: str = "snug/memory"


def begin() -> None:
    """Called on the thread that runs the prompt, as early as ComfyUI tells the node of it. An error is only logged:
    looking at memory must not end a run."""
    try:
        telemetry().monitor()
    except Exception:
        logger.warning("The memory of this prompt is not recorded.", exc_info=True)


@dataclass(frozen=True, slots=True)
class View:
    """What the node shows. picture: [1, height, width, 3] from 0 to 1. peak: for the page; device, peak_bytes, and the
    title of the node, of the highest peak; None when no node ran."""

    report: str
    picture: torch.Tensor
    peak: dict[str, Any] | None = None


def look(node_id: str, settings: Settings) -> View:
    """The prompt that this thread runs, until now.

    Raises SnugError when the report cannot be written. Anything else that goes wrong is in the report.
    """
    before = _sample()
    if settings.free_memory:
        management.unload_all_models()
        management.soft_empty_cache()
    try:
        return _look(node_id, settings, before)
    except SnugError:
        raise
    except Exception as error:
        logger.warning("The memory of this prompt cannot be shown.", exc_info=True)
        return View(f"The memory of this prompt cannot be shown: {error}", torch.zeros(1, HEIGHT, WIDTH, 3))


def _sample() -> Sample | None:
    try:
        return telemetry().take()
    except Exception:
        logger.debug("Memory could not be sampled.", exc_info=True)
        return None


def _look(node_id: str, settings: Settings, before: Sample | None) -> View:
    service = telemetry()
    record = service.monitor()  # ComfyUI without a cache of results does not call `begin`
    record.leave_out(node_id)
    sample = service.observe()
    remarks = [_freed(before, sample)] if settings.free_memory and before is not None else []
    report = report_text(record, sample, remarks)
    if settings.save_as != NOTHING:
        report += f"\n\nSaved as {_save(settings, record, sample)}"
    picture = np.asarray(draw_timeline(record, time.time()), dtype=np.float32) / 255
    peak = _peak(record)
    if settings.reset_peak:
        record.start_window(time.time())
    return View(report, torch.from_numpy(picture)[None], peak)


def _peak(record: PromptRecord) -> dict[str, Any] | None:
    node = record.highest()
    if node is None:
        return None
    return {"device": record.device, "peak_bytes": node.peak.get(record.device, 0), "node": node.title}


def _freed(before: Sample, after: Sample) -> str:
    names = ", ".join(row.name for row in before.models if row not in after.models)
    changes = zip(before.devices, after.devices, strict=True)
    freed = ", ".join(f"{size_text(max(0, new.free - old.free))} of {new.title}" for old, new in changes)
    return f"Freed before continuing: {freed}; unloaded: {names or 'nothing'}.\n"


def _save(settings: Settings, record: PromptRecord, sample: Sample) -> str:
    """Returns the file's path below the output folder."""
    text = (
        as_csv(record) if settings.save_as == CSV else as_json(record, sample, telemetry().events_of(record))
    )
    return save(settings.filename_prefix, f".{settings.save_as.lower()}", text)


def save(name: str, suffix: str, text: str) -> str:
    """Writes a report and returns its path below the output folder. Raises SnugError as `write_report` does."""
    folder = Path(folder_paths.get_output_directory())
    return write_report(folder, name, suffix, text).relative_to(folder.resolve()).as_posix()
