"""What was recorded, as text and as data. No ComfyUI, no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from .accounting import DeviceParts, ModelRow, Sample
from .events import Event
from .record import NodeRecord, PromptRecord

GIGABYTE, MEGABYTE = 2**30, 2**20
LONGEST_TITLE = 40
MOST_LINES = 60
COLUMNS: tuple[str, ...] = (
    "node_id",
    "node",
    "state",
    "start_seconds",
    "seconds",
    "device",
    "before_bytes",
    "peak_bytes",
    "after_bytes",
)


def size_text(nbytes: float) -> str:
    """For people: exact enough to compare, short enough for a table."""
    if abs(nbytes) >= GIGABYTE:
        return f"{nbytes / GIGABYTE:.2f} GB"
    return f"{round(nbytes / MEGABYTE)} MB"


def report_text(record: PromptRecord, sample: Sample, remarks: Iterable[str] = ()) -> str:
    """The devices and models as they are, and the nodes since the start of the window, the highest peak first."""
    lines = [*remarks, *(_device_line(parts) for parts in sample.devices)]
    if sample.models:
        lines += ["", "Models loaded:", *(_model_line(row) for row in sample.models)]
    nodes = sorted(record.nodes(), key=lambda node: -node.peak.get(record.device, 0))
    if nodes:
        what = "RAM of ComfyUI" if record.device == "cpu" else f"memory in use on {record.device}"
        lines += [
            "",
            f"Nodes by their peak ({what}; added: the peak beside what was in use before; kept: after it):",
        ]
        width = max(len(_short(node.title)) for node in nodes[:MOST_LINES])
        lines += [_node_line(node, record.device, width) for node in nodes[:MOST_LINES]]
        if len(nodes) > MOST_LINES:
            lines.append(f"… and {len(nodes) - MOST_LINES} more")
    else:
        lines += ["", "No node has run since recording began: ComfyUI had their results already."]
    return "\n".join(lines)


def _device_line(parts: DeviceParts) -> str:
    named = {
        "weights": parts.weights,
        "paged weights": parts.pages,
        "activations" if parts.is_gpu else "rest of ComfyUI": parts.activations,
        "cache": parts.cache,
        "driver and others" if parts.is_gpu else "other programs": parts.other,
    }
    taken = ", ".join(f"{name} {size_text(nbytes)}" for name, nbytes in named.items() if nbytes)
    where = parts.title if parts.title == "RAM" else f"{parts.title} ({parts.name})"
    return f"{where}: {taken}; {size_text(parts.free)} of {size_text(parts.total)} free"


def _model_line(row: ModelRow) -> str:
    where = [f"{size_text(row.on_device)} on {row.device}"]
    where += [f"{size_text(row.offloaded)} offloaded"] if row.offloaded else []
    where += [f"{size_text(row.pinned)} pinned"] if row.pinned else []
    last = f", last used by {row.last_node}" if row.last_node else ""
    return f"  {row.name} ({', '.join(row.formats)}): {', '.join(where)} of {size_text(row.total)}{last}"


def _node_line(node: NodeRecord, device: str, width: int) -> str:
    seconds = "running" if node.ended is None else f"{node.ended - node.started:.2f} s"
    stopped = ", stopped" if node.state == "stopped" else ""
    return (
        f"  {_short(node.title):<{width}}  peak {size_text(node.peak.get(device, 0)):>9}, added "
        f"{size_text(node.added(device)):>9}, kept {size_text(node.kept(device)):>9}, {seconds:>8}{stopped}"
    )


def _short(title: str) -> str:
    name, _, number = title.rpartition(" #")
    return title if len(name) <= LONGEST_TITLE else f"{name[: LONGEST_TITLE - 1]}… #{number}"


# ---- as data --------------------------------------------------------------------------------------------------------


def sample_data(sample: Sample) -> dict[str, Any]:
    """For JSON; bytes and seconds."""
    return asdict(sample)


def pushed_data(number: int, sample: Sample, events: Iterable[Event]) -> dict[str, Any]:
    """A sample as it is sent to clients, with the events since the one before."""
    return {"number": number, **sample_data(sample), "events": [event_data(event) for event in events]}


def event_data(event: Event) -> dict[str, Any]:
    """Without what does not apply."""
    return {name: value for name, value in asdict(event).items() if value is not None}


def node_data(node: NodeRecord) -> dict[str, Any]:
    return {**asdict(node), "added": {device: node.added(device) for device in node.peak}}


def record_data(record: PromptRecord, from_start: bool = True) -> dict[str, Any]:
    """The whole prompt, or what came after the start of the window."""
    return {
        "prompt_id": record.prompt_id,
        "device": record.device,
        "started": record.started if from_start else record.window_started,
        "ended": record.ended,
        "nodes": [node_data(node) for node in record.nodes(from_start)],
        "timeline": [asdict(point) for point in record.points(from_start)],
    }


def as_json(
    record: PromptRecord, sample: Sample, events: Iterable[Event] = (), from_start: bool = False
) -> str:
    """The whole prompt, or what came after the start of the window, with its events and what there is now."""
    data = record_data(record, from_start)
    happened = [event_data(event) for event in events if event.time >= data["started"]]
    return json.dumps({**data, "events": happened, "now": sample_data(sample)}, indent=1)


def as_csv(record: PromptRecord, from_start: bool = False) -> str:
    """One line for each node and device."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    start = record.started if from_start else record.window_started
    for node in record.nodes(from_start):
        table.writerows(_rows(node, start))
    return text.getvalue()


def _rows(node: NodeRecord, start: float) -> Iterable[Mapping[str, Any]]:
    seconds = "" if node.ended is None else f"{node.ended - node.started:.6f}"
    for device, peak in node.peak.items():
        values = (
            node.node_id,
            node.title,
            node.state,
            f"{node.started - start:.6f}",
            seconds,
            device,
            node.before.get(device, 0),
            peak,
            node.after.get(device, 0),
        )
        yield dict(zip(COLUMNS, values, strict=True))
