"""Copies through two buffers: whole, in order, and no buffer is filled again while a copy from it is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from snug.quant_backends.memory import staging as staging_module
from snug.quant_backends.memory.slab import host_bytes_in_use
from snug.quant_backends.memory.staging import LEAST_BYTES, Staging, staged, staged_copies

CPU = torch.device("cpu")
PIECE = 1 << 16


class LateEvent:
    """Of a device that copies as late as it may: when somebody waits for it."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], Any]] = []

    def synchronize(self) -> None:
        with torch.inference_mode():  # a device does not know of it
            while self.pending:
                self.pending.pop(0)()


class LateStaging(Staging):
    def _send(self, held: torch.Tensor, arriving: torch.Tensor, event: LateEvent) -> None:
        event.pending.append(lambda: arriving.copy_(held))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Addresses that the fake driver holds pinned."""
    held: list[int] = []

    def register(address: int, nbytes: int, flags: int) -> int:
        held.append(address)
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=held.remove)
    module = SimpleNamespace(cudart=lambda: runtime, Event=LateEvent)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    yield held


@pytest.mark.parametrize("shape", [(PIECE,), (5, PIECE // 2 + 2), (3 * PIECE,), (7,), (0,)])
def test_what_arrives_is_what_was_sent(shape: tuple[int, ...], registered: list[int]) -> None:
    staging = LateStaging(CPU, PIECE)
    sources = [
        torch.randn(shape),
        torch.randn(shape).to(torch.bfloat16),
        torch.arange(4 * PIECE, dtype=torch.int16),
    ]
    copies = [staging.copy(source) for source in sources]
    assert len(registered) == 2
    staging.close()
    for source, copy in zip(sources, copies, strict=True):
        assert copy.data_ptr() != source.data_ptr() or not source.numel()
        assert copy.dtype == source.dtype and torch.equal(copy, source)
    assert registered == [] and host_bytes_in_use() == 0


def test_inside_and_outside_of_inference_mode(registered: list[int]) -> None:
    staging = LateStaging(CPU, PIECE)
    with torch.inference_mode():
        inside = staging.copy(torch.ones(PIECE))
    outside = staging.copy(torch.ones(PIECE))
    staging.close()
    assert inside.is_inference() and not outside.is_inference()
    assert bool(inside.eq(1).all()) and bool(outside.eq(1).all())


def test_without_pinned_memory_copies_are_plain(
    registered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(Event=LateEvent)  # a device whose driver pins nothing
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    staging, source = LateStaging(CPU, PIECE), torch.ones(PIECE)
    assert torch.equal(staging.copy(source), source)
    staging.close()
    assert host_bytes_in_use() == 0


def test_only_large_weights_for_its_device_are_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Tensor] = []

    class Recording(Staging):
        def __init__(self, device: torch.device) -> None:
            self.device = torch.device("meta")

        def copy(self, source: torch.Tensor) -> torch.Tensor:
            copied.append(source)
            return source.to(self.device)

        def close(self) -> None:
            copied.append(torch.empty(0))

    monkeypatch.setattr(staging_module, "Staging", Recording)
    large, small = torch.zeros(LEAST_BYTES, dtype=torch.uint8), torch.zeros(64)
    with staged_copies(torch.device("cuda", 0)):
        assert staged(large, torch.device("meta")).is_meta and len(copied) == 1
        for source, device in [(small, "meta"), (large[::2], "meta"), (large, "cpu")]:
            assert staged(source, torch.device(device)).device.type == device
        assert len(copied) == 1
    assert len(copied) == 2  # closed
    staged(large, torch.device("meta"))
    with staged_copies(CPU), staged_copies(None):
        staged(large, torch.device("meta"))
    assert len(copied) == 2
