"""What `StreamTransfer` asks of its stream and events, in which order. Whether it is enough only a GPU can tell."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from itertools import count

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.memory.executor import GroupOffload
from snug.quant_backends.memory.plan import Block, make_plan
from snug.quant_backends.memory.slab import host_bytes_in_use
from snug.quant_backends.memory.transfer import DiskTransfer, StreamTransfer

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

            def synchronize(self) -> None:
                pass

            def __str__(self) -> str:
                # Made in two rows, one for each direction, with an event for each slot.
                return f"{('copied', 'released')[number // 2]} {number % 2}"

        return Event()

    def current_stream(self, _: torch.device) -> object:
        return self._compute

    @contextlib.contextmanager
    def stream(self, _: object) -> Iterator[None]:
        yield


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    return device


def test_events_go_both_ways(device: FakeDevice) -> None:
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


@pytest.mark.parametrize("kind", [StreamTransfer, DiskTransfer])
@pytest.mark.parametrize("opened_in", [True, False], ids=["inference", "ordinary"])
def test_weights_arrive_in_and_out_of_inference_mode(
    device: FakeDevice, kind: type[StreamTransfer], opened_in: bool
) -> None:
    weights = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(12)]
    plan = make_plan([Block("", (weight.nbytes,)) for weight in weights], keep=3 * 64 * 64 * 4)
    with torch.inference_mode(opened_in):
        offload = GroupOffload(plan, lambda block: [weights[block]], kind(CPU))
    for step in range(6):
        with torch.inference_mode(step % 2 == 0):
            for block in range(12 if step % 3 else 7):
                (found,) = offload.acquire(block)
                assert torch.equal(found, weights[block]) and not found.is_inference()
                offload.release(block)
    offload.close()


def test_weights_on_disk_take_memory_for_the_slots_alone(device: FakeDevice) -> None:
    gc.collect()
    before = host_bytes_in_use()
    weights = [torch.randn(256) for _ in range(12)]
    plan = make_plan([Block("", (1024,))] * 12, prefetch=1)
    offload = GroupOffload(plan, lambda block: [weights[block]], DiskTransfer(CPU))
    assert host_bytes_in_use() - before == 2 * 1024
    offload.close()
    assert host_bytes_in_use() == before


def test_what_goes_wrong_while_reading_comes_out_where_it_is_waited_for(device: FakeDevice) -> None:
    weights = {block: torch.randn(256) for block in range(12)}
    plan = make_plan([Block("", (1024,))] * 12)
    offload = GroupOffload(plan, lambda block: [weights[block]], DiskTransfer(CPU))
    offload.acquire(0)
    lost = weights.pop(9)
    with pytest.raises(KeyError):
        offload.acquire(9)
    weights[9] = lost
    assert torch.equal(offload.acquire(9)[0], lost)
    offload.close()


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _: FakeDevice(is_there=False))
    with pytest.raises(SnugError, match="cannot be streamed to cpu"):
        StreamTransfer(CPU)
