"""Weights of real formats on their way through a slab and its slots."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from random_packed import random_packed
from safetensors.torch import save_file
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.memory.executor import GroupOffload
from snug.quant_backends.memory.plan import ALIGNMENT, Block, make_plan
from snug.quant_backends.memory.simulated import SimulatedDevice, SimulatedTransfer
from snug.quant_backends.memory.slab import GroupLayout, HostBuffer, host_bytes_in_use
from snug.quant_backends.memory.transfer import SlabTransfer
from snug.quant_backends.readers.safetensors_file import SafetensorsFile

FORMATS = (
    "Q8_0",
    "Q4_K",
    "Q6_K",
    "IQ4_XS",
    "bnb-nf4-64",
    "bnb-nf4-64-nested-256",
    "bnb-fp4-64",
    "int8-rows",
) + (
    "int8-1x32-zero",
    "float8_e4m3fn-rows",
    "quanto-int4-128",
)
SHAPE = (24, 256)


def plain_tensors(packed: PackedTensor) -> list[torch.Tensor]:
    return [packed.data, *packed.parts.values()]


def test_packed_weights_arrive_as_they_left() -> None:
    weights = [random_packed(name, SHAPE, seed=seed) for seed in range(3) for name in FORMATS]
    blocks = [
        Block(weight.format.name, tuple(tensor.nbytes for tensor in plain_tensors(weight)))
        for weight in weights
    ]
    offload = GroupOffload(
        make_plan(blocks, limit=sum(block.nbytes for block in blocks) // 2),
        lambda block: plain_tensors(weights[block]),
        SimulatedTransfer(SimulatedDevice()),
    )
    for _ in range(3):
        for block, weight in enumerate(weights):
            data, *parts = offload.acquire(block)
            arrived = PackedTensor(
                data, weight.format, weight.shape, dict(zip(weight.parts, parts, strict=True))
            )
            found, wanted = (dequantize_packed(tensor).view(torch.int32) for tensor in (arrived, weight))
            assert torch.equal(found, wanted)
            offload.release(block)
    offload.close()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool]
)
def test_tensors_of_any_kind_and_shape(dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in [(), (0,), (1,), (7, 5), (2, 3, 4)]] + [
        torch.randn(6, 4).to(dtype).T
    ]
    plan = make_plan([Block("block", tuple(tensor.nbytes for tensor in tensors))])
    layout = GroupLayout(plan, lambda _: tensors)
    memory = HostBuffer(plan.slab_bytes)
    layout.fill(0, memory.bytes)
    views = layout.views(0, memory.bytes)
    for view, tensor in zip(views, tensors, strict=True):
        assert (view.dtype, view.shape, view.is_contiguous()) == (dtype, tensor.shape, True)
        assert torch.equal(view.float(), tensor.float())
        assert view.storage_offset() * view.element_size() % ALIGNMENT == 0
    memory.close()


class FakeRuntime:
    """Stands for CUDA's, which needs a GPU: at most `room` bytes can be pinned."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.pinned: dict[int, int] = {}

    def cudart(self) -> FakeRuntime:
        return self

    def synchronize(self, _: torch.device) -> None:
        pass

    def cudaHostRegister(self, address: int, nbytes: int, _: int) -> int:
        if nbytes > self.room:
            return 2
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        del self.pinned[address]


def test_pinned_memory_is_given_back_also_by_who_forgets_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(room=1 << 20)
    monkeypatch.setattr(torch, "get_device_module", lambda _: runtime)
    gc.collect()
    before = host_bytes_in_use(pinned_only=True)
    closed, forgotten = (HostBuffer(4096, torch.device("cpu")) for _ in range(2))
    assert closed.is_pinned and list(runtime.pinned.values()) == [4096, 4096]
    assert host_bytes_in_use(pinned_only=True) == before + 8192
    closed.close()
    assert not closed.is_pinned
    del forgotten
    gc.collect()
    assert runtime.pinned == {}
    assert host_bytes_in_use(pinned_only=True) == before


def test_weights_move_in_before_the_memory_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning takes all of the memory at once: before, the weights would be there twice."""
    runtime = FakeRuntime(room=1 << 20)
    monkeypatch.setattr(torch, "get_device_module", lambda _: runtime)
    transfer = SlabTransfer(torch.device("cpu"), pin=True)
    pinned_after: list[bool] = []
    transfer.on_staged = lambda *_: pinned_after.append(bool(runtime.pinned))
    tensors = [torch.ones(100), torch.ones(50)]
    plan = make_plan([Block("block", (tensor.nbytes,)) for tensor in tensors])
    transfer.open(plan, lambda block: [tensors[block]])
    assert transfer.is_pinned and pinned_after == [False, False]
    transfer.close()
    assert runtime.pinned == {}


def test_where_pinning_fails_memory_stays_pageable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _: FakeRuntime(room=0))
    memory = HostBuffer(4096, torch.device("cpu"))
    assert not memory.is_pinned
    assert "Cannot pin" in caplog.text
    assert memory.bytes.fill_(1).sum() == 4096
    memory.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_of_a_mapped_file_are_held_once(tmp_path: Path) -> None:
    save_file({str(index): torch.ones(8 << 20, dtype=torch.uint8) for index in range(12)}, tmp_path / "model")
    file = SafetensorsFile(tmp_path / "model")
    tensors = [file.read(name) for name in file.tensors]
    plan = make_plan([Block(name, (8 << 20,)) for name in file.tensors])
    layout = GroupLayout(plan, lambda block: [tensors[block]])
    before = anonymous_bytes()
    memory = HostBuffer(plan.slab_bytes)
    for number, group in enumerate(plan.groups):
        layout.fill(number, memory.bytes.narrow(0, group.offset, group.nbytes))
        assert anonymous_bytes() - before <= group.offset + group.nbytes + (8 << 20)
    memory.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_200_models() -> None:
    blocks = [Block(str(index), (1 << 20, 1000)) for index in range(16)]
    tensors = [torch.ones(1 << 20, dtype=torch.uint8), torch.zeros(250)]
    gc.collect()
    before = host_bytes_in_use()

    def cycle(number: int) -> None:
        plan = make_plan(blocks, keep=(number % 4) << 20, blocks_per_group=1 + number % 2)
        offload = GroupOffload(plan, lambda _: tensors, SimulatedTransfer(SimulatedDevice()))
        for block in range(len(blocks) - number % 3):  # broken off now and then
            offload.acquire(block)
            offload.release(block)
        offload.close()

    for number in range(20):
        cycle(number)
    gc.collect()
    start = resident_bytes()
    for number in range(200):
        cycle(number)
    gc.collect()
    assert host_bytes_in_use() == before
    assert resident_bytes() <= 1.02 * start
