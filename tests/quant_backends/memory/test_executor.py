"""The executor on a simulated device, whose slots hold poison until they are waited for."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_models import MODELS, blocks_of
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.memory.executor import GroupOffload
from snug.quant_backends.memory.plan import Block, OffloadPlan, make_plan
from snug.quant_backends.memory.simulated import SimulatedDevice, SimulatedTransfer, simulate
from snug.quant_backends.memory.slab import host_bytes_in_use
from snug.quant_backends.memory.transfer import DirectTransfer

LINK = 1e6
RATIOS = (0.3, 0.5, 0.7, 0.85, 0.95, 1.0, 1.05, 1.15, 1.3, 1.6, 2.0, 3.0)


class Model:
    """Blocks of random bytes, and steps over them that check every byte."""

    def __init__(self, plan: OffloadPlan, device: SimulatedDevice | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.plan = plan
        self.tensors = [
            [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in block.sizes]
            for block in plan.blocks
        ]
        self.device = device or SimulatedDevice(plan.link)
        self.transfer = SimulatedTransfer(self.device)
        self.offload = GroupOffload(plan, self.tensors.__getitem__, self.transfer)

    def run(self, block: int) -> None:
        found = self.offload.acquire(block)
        self.device.compute(block, self.plan.blocks[block].seconds)
        assert all(map(torch.equal, found, self.tensors[block]))
        self.offload.release(block)

    def step(self, blocks: Sequence[int] | None = None) -> None:
        for block in range(len(self.plan.blocks)) if blocks is None else blocks:
            self.run(block)


def even(count: int = 12, **limits: int) -> OffloadPlan:
    """Blocks of a second each, to compute as well as to copy."""
    blocks = [Block(str(index), (1 << 9,), 1.0) for index in range(count)]
    return make_plan(blocks, link=1 << 9, **limits)


def test_copies_and_computing_come_in_this_order() -> None:
    model = Model(even(3))
    for _ in range(2):
        model.step()
    seen = [(event.kind, event.of, event.start, event.end) for event in model.device.events]
    assert seen == [
        ("copy", 0, 0, 1),
        ("copy", 1, 1, 2),
        ("stall", 0, 0, 1),
        ("compute", 0, 1, 2),
        ("copy", 2, 2, 3),
        ("compute", 1, 2, 3),
        ("copy", 0, 3, 4),
        ("compute", 2, 3, 4),
        ("copy", 1, 4, 5),
        ("compute", 0, 4, 5),
        ("copy", 2, 5, 6),
        ("compute", 1, 5, 6),
        ("copy", 0, 6, 7),
        ("compute", 2, 6, 7),
        ("copy", 1, 7, 8),
    ]


def test_what_is_prefetched_before_the_step_is_not_waited_for() -> None:
    model = Model(even())
    model.offload.prefetch()
    model.device.now = 10.0
    model.step()
    assert model.device.now == 22.0
    assert model.offload.late_copies == 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kept", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("blocks_per_group", [1, 2])
def test_a_step_takes_what_the_slower_of_copies_and_computing_takes(
    model: str, kept: float, blocks_per_group: int
) -> None:
    keep = int(kept * sum(block.nbytes for block in blocks_of(model)))
    for ratio in RATIOS:
        streamed = make_plan(blocks_of(model), keep=keep, link=LINK).transfer_seconds
        blocks = blocks_of(model, seconds=streamed / ratio)
        plan = make_plan(blocks, keep=keep, blocks_per_group=blocks_per_group, link=LINK)
        seconds = simulate(plan)
        assert seconds <= 1.05 * max(plan.compute_seconds, plan.transfer_seconds), ratio
        assert seconds == pytest.approx(plan.step_seconds)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_one_wait_and_one_copy_for_each_group_and_no_more_ahead_than_planned(model: str, kept: float) -> None:
    keep = int(kept * sum(block.nbytes for block in blocks_of(model)))
    plan = make_plan(blocks_of(model, seconds=1.0), keep=keep, blocks_per_group=3, link=LINK, prefetch=1)
    runner = Model(plan)
    for _ in range(4):
        runner.step()
    copies = [event.of for event in runner.device.events if event.kind == "copy"]
    count = len(plan.groups)
    assert copies == [number % count for number in range(4 * count + plan.slots)]
    assert runner.transfer.waits == 4 * count
    assert runner.transfer.most_ahead == 1
    assert runner.offload.late_copies == 1  # the very first


def test_never_more_than_two_groups_ahead() -> None:
    model = Model(make_plan(blocks_of("30 uneven", 1.8), keep=1 << 19, link=LINK))
    for _ in range(3):
        model.step()
    assert (model.plan.slots, model.transfer.most_ahead) == (3, 2)


def test_blocks_that_stay_are_copied_once_and_never_waited_for() -> None:
    model = Model(even(limit=12 << 9))
    model.step()
    assert model.transfer.waits == 0
    assert {event.kind for event in model.device.events} == {"compute"}


def test_a_step_broken_off_50_times() -> None:
    model = Model(make_plan(blocks_of("flux", 1.0), keep=1 << 19, blocks_per_group=2, link=LINK))
    rng = random.Random(0)
    for _ in range(50):
        broken = rng.randrange(len(model.plan.blocks))
        model.step(range(broken))
        model.offload.acquire(broken)  # and its layers raised: it is never released
        model.step()
    assert model.transfer.most_ahead <= model.plan.slots - 1


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 19), st.booleans()), max_size=80),
    st.sampled_from([0, 10_000]),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_blocks_in_any_order_get_their_own_bytes(
    calls: list[tuple[int, bool]], keep: int, blocks_per_group: int, prefetch: int
) -> None:
    blocks = [Block(str(index), (700, 0, index)) for index in range(20)]
    model = Model(make_plan(blocks, keep=keep, blocks_per_group=blocks_per_group, prefetch=prefetch))
    for block, is_broken_off in calls:
        if is_broken_off:
            model.offload.acquire(block)
        else:
            model.run(block)
    model.step()
    assert model.transfer.most_ahead <= model.plan.slots - 1


def test_blocks_left_out_are_not_waited_for() -> None:
    model = Model(even())
    model.step()
    model.step([0, 1, 2, 9, 10, 11])  # as caches of earlier steps and skip-layer guidance do
    late = model.offload.late_copies
    model.step()
    assert model.offload.late_copies == late == 2


def test_two_models_share_the_device() -> None:
    device = SimulatedDevice(1 << 9)
    models = [Model(even(10), device), Model(even(7, keep=2 << 9), device)]
    for _ in range(3):
        for model in models:
            model.step()
    assert all(model.transfer.most_ahead <= 2 for model in models)
    models[0].offload.close()
    models[1].step()


def test_on_the_cpu_nothing_is_copied() -> None:
    tensors = [[torch.rand(16)] for _ in range(5)]
    plan = make_plan([Block("", (64,))] * 5)
    offload = GroupOffload(plan, tensors.__getitem__, DirectTransfer())
    for block in range(5):
        (found,) = offload.acquire(block)
        assert found is tensors[block][0]
        offload.release(block)


def test_freed_weights_are_refused_and_leave_nothing() -> None:
    before = host_bytes_in_use()
    model = Model(even())
    assert host_bytes_in_use() == before + model.plan.slab_bytes
    model.offload.close()
    model.offload.close()
    assert host_bytes_in_use() == before
    model.offload.release(0)
    with pytest.raises(SnugError, match="were freed"):
        model.offload.acquire(0)


def test_weights_that_do_not_fit_the_plan_are_refused_and_leave_nothing() -> None:
    before = host_bytes_in_use()
    tensors = [[torch.zeros(512)]] * 12
    with pytest.raises(SnugError, match=r"Block 0 has tensors of \(2048,\) bytes .* made for \(512,\)"):
        GroupOffload(even(), tensors.__getitem__, SimulatedTransfer(SimulatedDevice()))
    assert host_bytes_in_use() == before
