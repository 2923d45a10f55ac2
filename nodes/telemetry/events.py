"""What happened to models and memory: loads and unloads, allocations that failed. No ComfyUI, no torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Literal, Protocol

from .buffers import Numbers, RingBuffer

Kind = Literal["load", "unload", "oom", "retry"]

EVENTS = 500
Key = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Event:
    """time: seconds since the epoch. node: the title of the node that ran then.

    load, unload: `bytes` of `model` came to `device` or left it. retry: torch freed its cache there to get memory. oom:
    there was not enough even so.
    """

    time: float
    kind: Kind
    model: str | None = None
    device: str | None = None
    bytes: int | None = None
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """What a device holds of a model, in bytes; of a model whose weights are paged all that it has."""

    model: str
    device: str
    bytes: int


class Failures(Protocol):
    """Counters of a device, as in DeviceReading."""

    @property
    def retries(self) -> int: ...

    @property
    def ooms(self) -> int: ...


class Events:
    """The last events, found by comparing what is there with what was there before. Any thread may use it."""

    def __init__(self, numbers: Numbers) -> None:
        self.ring: RingBuffer[Event] = RingBuffer(EVENTS, numbers)
        self._lock = threading.Lock()
        self._is_first = True
        self._holdings: Mapping[Key, Holding] = {}
        self._failures: dict[str, tuple[int, int]] = {}
        self._uncounted: dict[str, int] = {}

    def forget(self) -> None:
        """Nobody has looked for a while: what comes next is what there is, and no event."""
        with self._lock:
            self._is_first = True

    def note(
        self, now: float, holdings: Mapping[Key, Holding], failures: Mapping[str, Failures], node: str | None
    ) -> None:
        """What there is now.

        holdings: of the models that are loaded, by the model's number and the device. failures: by device. node: the
        title of the one that ran since this was called last.
        """
        with self._lock:
            changes = [*self._loads(now, holdings, node), *self._failed(now, failures, node)]
            self._holdings = dict(holdings)
            self._failures.update(
                {device: (counter.retries, counter.ooms) for device, counter in failures.items()}
            )
            if self._is_first:
                self._is_first = False
                return
            for event in changes:
                self.ring.add(event)

    def _loads(self, now: float, holdings: Mapping[Key, Holding], node: str | None) -> Iterator[Event]:
        before = self._holdings
        for key in [*(key for key in before if key not in holdings), *holdings]:
            old, new = before.get(key), holdings.get(key)
            change = (new.bytes if new else 0) - (old.bytes if old else 0)
            found = new or old
            if found is not None and change:
                kind = "load" if change > 0 else "unload"
                yield Event(now, kind, found.model, found.device, abs(change), node)

    def _failed(self, now: float, failures: Mapping[str, Failures], node: str | None) -> Iterator[Event]:
        for device, counter in failures.items():
            retries, ooms = self._failures.get(device, (0, 0))
            failed = Event(now, "retry", device=device, node=node)
            yield from repeat(failed, min(counter.retries - retries, EVENTS))
            yield from repeat(replace(failed, kind="oom"), min(counter.ooms - ooms, EVENTS))

    def prompt_ran_out(self, started: float, now: float, device: str, node: str | None) -> None:
        """A prompt ended so. Nothing is added when torch has counted that since it `started`."""
        if any(event.kind == "oom" for event in self.between(started, now)):
            return
        with self._lock:
            self._uncounted[device] = self._uncounted.get(device, 0) + 1
            self.ring.add(Event(now, "oom", device=device, node=node))

    def counters(self) -> dict[str, dict[str, int]]:
        """By device: how often memory was asked for again (retries) and ran out (ooms), as far as anybody counted."""
        with self._lock:
            found = {
                device: {"retries": retries, "ooms": ooms}
                for device, (retries, ooms) in self._failures.items()
            }
            for device, ooms in self._uncounted.items():
                found.setdefault(device, {"retries": 0, "ooms": 0})["ooms"] += ooms
            return found

    def between(self, start: float, end: float) -> list[Event]:
        """Those of a time, the oldest first."""
        return [event for _, event in self.ring.since() if start <= event.time <= end]
