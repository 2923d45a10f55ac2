"""Peak, growth and time of each node of a prompt. No ComfyUI, no torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .accounting import DeviceParts
from .buffers import Timeline

State = Literal["running", "done", "stopped"]

MOST_NODES = 2000
MOST_STEPS = 500
POINTS = 1200


@dataclass(frozen=True, slots=True)
class Counter:
    """Bytes in use now, and the most since the counter was read before. retries, ooms: as in DeviceReading."""

    current: int
    peak: int
    retries: int = 0
    ooms: int = 0


Counters = Mapping[str, Counter]


@dataclass(slots=True)
class NodeRecord:
    """One run of a node. Times in seconds of a clock that only goes forward; bytes by device."""

    node_id: str
    title: str
    started: float
    before: dict[str, int]
    ended: float | None = None
    peak: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    state: State = "running"

    def added(self, device: str) -> int:
        """The most that the node took beside what was in use when it started."""
        return max(0, self.peak.get(device, 0) - self.before.get(device, 0))

    def kept(self, device: str) -> int:
        """What is in use after it more than before; negative when it freed memory."""
        return self.after.get(device, 0) - self.before.get(device, 0)


@dataclass(frozen=True, slots=True)
class Point:
    """What one device holds at a time, in bytes."""

    time: float
    weights: int
    activations: int
    pages: int
    cache: int

    @property
    def used(self) -> int:
        return self.weights + self.activations + self.pages


class PromptRecord:
    """The nodes of a prompt in the order in which they started, and the memory of `device` meanwhile.

    Several nodes may be open at once (asynchronous ones, and those that expand into others): each of them gets the
    peaks of its whole time.
    """

    def __init__(self, prompt_id: str, device: str, started: float) -> None:
        self.prompt_id = prompt_id
        self.device = device
        self.started = started
        self.ended: float | None = None
        self.window_started = started
        self._nodes: list[NodeRecord] = []
        self._open: dict[str, NodeRecord] = {}
        self._points: Timeline[Point] = Timeline(POINTS, lambda point: point.used)
        self._lock = threading.RLock()

    # ---- what happens ----------------------------------------------------------------------------------------------

    def open(self, node_id: str, title: str, now: float, counters: Counters) -> None:
        """A node starts; one that was open already starts anew (it had waited for its inputs)."""
        with self._lock:
            self.observe(now, counters)
            self._open.pop(node_id, None)
            self._nodes = [node for node in self._nodes if node.node_id != node_id or node.ended is not None]
            if len(self._nodes) >= MOST_NODES or self.ended is not None:
                return
            current = {device: counter.current for device, counter in counters.items()}
            node = NodeRecord(node_id, title, now, current, peak=dict(current), after=dict(current))
            self._nodes.append(node)
            self._open[node_id] = node

    def step(self, node_id: str, now: float) -> None:
        with self._lock:
            node = self._open.get(node_id)
            if node is not None and len(node.steps) < MOST_STEPS:
                node.steps.append(now)

    def close(self, node_id: str, now: float, counters: Counters) -> NodeRecord | None:
        """A node ends; None for one that never started, as ComfyUI had its result."""
        with self._lock:
            self.observe(now, counters)
            node = self._open.pop(node_id, None)
            if node is not None:
                node.ended, node.state = now, "done"
            return node

    def leave_out(self, node_id: str) -> None:
        """The node that looks at the record does not look at itself."""
        with self._lock:
            node = self._open.pop(node_id, None)
            self._nodes = [other for other in self._nodes if other is not node]

    def observe(self, now: float, counters: Counters) -> None:
        """Counters were read: their peaks belong to all nodes that are open."""
        with self._lock:
            for device, counter in counters.items():
                for node in self._open.values():
                    node.peak[device] = max(node.peak.get(device, 0), counter.peak)
                    node.after[device] = counter.current

    def sample(self, now: float, parts: DeviceParts) -> None:
        with self._lock:
            if self.ended is None:
                self._points.add(Point(now, parts.weights, parts.activations, parts.pages, parts.cache))

    def finish(self, now: float, counters: Counters) -> None:
        """The prompt ended; nodes that are still open were stopped by an error or by the user."""
        with self._lock:
            if self.ended is not None:
                return
            self.observe(now, counters)
            for node in self._open.values():
                node.ended, node.state = now, "stopped"
            self._open.clear()
            self.ended = now

    def start_window(self, now: float) -> None:
        """From here on `nodes` and `points` show what comes after."""
        with self._lock:
            self.window_started = now

    # ---- what happened ---------------------------------------------------------------------------------------------

    def nodes(self, from_start: bool = False) -> list[NodeRecord]:
        with self._lock:
            start = self.started if from_start else self.window_started
            return [node for node in self._nodes if node.started >= start]

    def points(self, from_start: bool = False) -> list[Point]:
        with self._lock:
            start = self.started if from_start else self.window_started
            return [point for point in self._points.values() if point.time >= start]

    def running(self) -> str | None:
        """The title of the node that started last and runs."""
        with self._lock:
            return next(reversed([node.title for node in self._open.values()]), None)

    def stopped(self, node_id: str) -> str | None:
        """The title of the node with this id, or of another one that was stopped, as nodes may run inside others."""
        with self._lock:
            found = [node for node in self._nodes if node.node_id == node_id or node.state == "stopped"]
            return max(found, key=lambda node: node.node_id == node_id).title if found else None

    def highest(self) -> NodeRecord | None:
        """The node with the highest peak on the device."""
        return max(self.nodes(), key=lambda node: node.peak.get(self.device, 0), default=None)
