"""What `StreamTransfer` asks of its stream and events, in which order. Whether it is enough only a GPU can tell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import count

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.memory.executor import GroupOffload
from snug.quant_backends.memory.plan import Block, make_plan
from snug.quant_backends.memory.transfer import StreamTransfer

CPU = torch.device("cpu")


class FakeDevice:
    """Stands for torch.cuda: writes down what is asked of it."""

    def __init__(self, is_there: bool = True) -> None:
        self.log: list[str] = []
        self._is_there = is_there
        self._events = count()
        self._compute = self._stream("compute")

    def is_available(self) -> bool:
        return self._is_there

    def _stream(self, name: str) -> object:
        log = self.log

        class Stream:
            def wait_event(self, event: object) -> None:
                log.append(f"{name} waits for {event}")

            def synchronize(self) -> None:
                log.append(f"host waits for {name}")

            def __str__(self) -> str:
                return name

        return Stream()

    def Stream(self, device: torch.device) -> object:
        return self._stream("copies")

    def Event(self) -> object:
        log, number = self.log, next(self._events)

        class Event:
            def record(self, stream: object) -> None:
                log.append(f"{stream} records {self}")

            def __str__(self) -> str:
                # Made in two rows, one for each direction, with an event for each slot.
                return f"{('copied', 'released')[number // 2]} {number % 2}"

        return Event()

    def current_stream(self, _: torch.device) -> object:
        return self._compute

    @contextlib.contextmanager
    def stream(self, _: object) -> Iterator[None]:
        yield


def test_events_go_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    weights = [torch.full((256,), float(block)) for block in range(3)]
    plan = make_plan([Block("", (1024,))] * 3, prefetch=1)
    offload = GroupOffload(plan, lambda block: [weights[block]], StreamTransfer(CPU))
    for block in range(3):
        device.log.append(f"acquire {block}")
        assert torch.equal(offload.acquire(block)[0], weights[block])
        device.log.append(f"release {block}")
        offload.release(block)
    offload.close()

    def copy(slot: int) -> list[str]:
        released = f"released {slot}"
        return [
            f"compute records {released}",
            f"copies waits for {released}",
            f"copies records copied {slot}",
        ]

    assert device.log == [
        "compute records released 0",
        "compute records released 1",
        *("acquire 0", *copy(0), *copy(1), "compute waits for copied 0"),
        *("release 0", *copy(0)),
        *("acquire 1", "compute waits for copied 1"),
        *("release 1", *copy(1)),
        *("acquire 2", "compute waits for copied 0"),
        *("release 2", *copy(0)),
        "host waits for copies",
    ]


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _: FakeDevice(is_there=False))
    with pytest.raises(SnugError, match="cannot be streamed to cpu"):
        StreamTransfer(CPU)
