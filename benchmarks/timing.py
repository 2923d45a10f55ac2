"""Times of several contenders that take turns, so that a drift of the machine falls on all of them alike.

On a CUDA device the time of a part is that between two events on its stream, and the time that Python needs to hand
the work over is measured apart; on a CPU both are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

WHOLE = "whole"


@dataclass
class Times:
    """Seconds of each round by name of the part; `host`: until Python had handed the work over."""

    device: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, list[float]] = field(default_factory=dict)

    def seconds(self, part: str = WHOLE) -> float:
        return median(self.device[part])

    def host_seconds(self, part: str = WHOLE) -> float:
        return median(self.host[part])


class Stopwatch:
    """Marks the beginning and end of parts of one call; `take` adds what was found to Times."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float, float, Any, Any]] = []

    def _event(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> tuple[float, Any]:
        event = self._event()
        return time.perf_counter(), event

    def end(self, part: str, begun: tuple[float, Any]) -> None:
        stopped = time.perf_counter()
        self._marks.append((part, begun[0], stopped, begun[1], self._event()))

    def take(self, times: Times) -> None:
        """Waits for the device; of parts that ran several times the mean counts."""
        synchronize(self.device)
        found: dict[str, list[tuple[float, float]]] = {}
        for part, started, stopped, first, last in self._marks:
            host = stopped - started
            seconds = host if first is None else first.elapsed_time(last) / 1e3
            found.setdefault(part, []).append((seconds, host))
        for part, pairs in found.items():
            times.device.setdefault(part, []).append(sum(seconds for seconds, _ in pairs) / len(pairs))
            times.host.setdefault(part, []).append(sum(host for _, host in pairs) / len(pairs))
        self._marks.clear()


def watch_modules(modules: Mapping[str, list[torch.nn.Module]], watch: Stopwatch) -> list[Any]:
    """Hooks that time every call of the modules, under the name of their list; remove them afterwards."""
    handles = []
    for part, members in modules.items():
        for module in members:
            begun: list[tuple[float, Any]] = []
            handles.append(
                module.register_forward_pre_hook(lambda *_, begun=begun: begun.append(watch.begin()))
            )
            handles.append(
                module.register_forward_hook(lambda *_, part=part, begun=begun: watch.end(part, begun.pop()))
            )
    return handles


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    parts: Mapping[str, Mapping[str, list[torch.nn.Module]]] | None = None,
    warm_up: int = 1,
) -> dict[str, Times]:
    """Times of each run over the rounds, in turns. parts: modules of a run to be timed by themselves, as above."""
    times = {name: Times() for name in runs}
    watch = Stopwatch(device)
    for turn in range(warm_up + rounds):
        for name, run in runs.items():
            handles = watch_modules((parts or {}).get(name, {}), watch)
            try:
                begun = watch.begin()
                run()
                watch.end(WHOLE, begun)
            finally:
                for handle in handles:
                    handle.remove()
            watch.take(times[name] if turn >= warm_up else Times())
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_growth(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that torch allocated at most during a call beyond what was there; None where it does not count."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
