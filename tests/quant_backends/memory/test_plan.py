from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.memory.plan import ALIGNMENT, Block, OffloadPlan, least_limit, make_plan

GB = 2**30

blocks_of_any_size = st.lists(
    st.builds(
        Block,
        st.just("block"),
        st.lists(st.integers(0, 1 << 20), max_size=5).map(tuple),
        st.sampled_from([0.0, 1e-3, 5e-3]),
    ),
    max_size=70,
)


def check_layout(plan: OffloadPlan, blocks_per_group: int) -> None:
    order = [index for group in plan.groups for index in group.blocks]
    assert order == sorted(set(order)), "every streamed block once, in the order of execution"
    assert all(1 <= len(group.blocks) <= blocks_per_group for group in plan.groups)
    taken = 0
    for group in plan.groups:
        assert group.offset == taken
        start = taken
        for index in group.blocks:
            block = plan.blocks[index]
            for offset, size in zip(block.offsets, block.sizes, strict=True):
                assert (start + offset) % ALIGNMENT == 0
                assert start + offset >= taken
                taken = start + offset + size
            assert taken <= start + block.nbytes
            start = taken = start + block.nbytes
        assert group.nbytes == taken - group.offset <= plan.slot_bytes
    assert taken == plan.slab_bytes
    stays = sum(block.nbytes for index, block in enumerate(plan.blocks) if index not in plan.streamed)
    assert plan.resident_bytes == stays
    assert plan.device_bytes == stays + plan.slots * plan.slot_bytes


@given(
    blocks_of_any_size,
    st.integers(0, 70 << 20),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from([None, 0, 1, 3]),
)
def test_any_blocks_within_any_limit(
    blocks: list[Block], most: int, is_limit: bool, blocks_per_group: int, prefetch: int | None
) -> None:
    total = sum(block.nbytes for block in blocks)
    least = min(total, least_limit(blocks, blocks_per_group, prefetch))
    limits = {"limit" if is_limit else "keep": most}
    try:
        plan = make_plan(blocks, **limits, blocks_per_group=blocks_per_group, prefetch=prefetch)
    except SnugError as error:
        assert is_limit and most < least
        assert "needs at least" in str(error)
        return
    assert not is_limit or most >= least
    check_layout(plan, blocks_per_group)
    assert (plan.device_bytes if is_limit else plan.resident_bytes) <= most
    assert plan.step_seconds >= max(plan.compute_seconds, plan.transfer_seconds) * (1 - 1e-9)
    if most >= total:
        assert plan.groups == () and plan.device_bytes == total


@given(blocks_of_any_size.filter(lambda blocks: any(block.nbytes for block in blocks)), st.integers(1, 4))
def test_what_the_error_says_is_enough(blocks: list[Block], blocks_per_group: int) -> None:
    with pytest.raises(SnugError, match="needs at least") as raised:
        make_plan(blocks, limit=0, blocks_per_group=blocks_per_group)
    needed, unit = str(raised.value).partition("at least ")[2].partition(";")[0].split()
    limit = int((float(needed) + 0.05) * {"MB": 1 << 20, "GB": 1 << 30}[unit]) + 1
    assert make_plan(blocks, limit=limit, blocks_per_group=blocks_per_group).device_bytes <= limit


@pytest.mark.parametrize("count", [20, 33, 60])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_what_stays_is_spread_evenly(count: int, share: float) -> None:
    blocks = [Block("", (1 << 20,))] * count
    plan = make_plan(blocks, keep=int(share * count) << 20)
    streamed = sorted(plan.streamed)
    gaps = {after - before for before, after in zip(streamed, streamed[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1
    assert len(streamed) == count - int(share * count)


def test_one_huge_block_stays_rather_than_making_the_slots_huge() -> None:
    blocks = [Block("embedding", (400 << 20,)), *[Block(f"blocks.{n}", (10 << 20,)) for n in range(60)]]
    plan = make_plan(blocks, limit=500 << 20)
    assert 0 not in plan.streamed
    assert plan.slot_bytes == 10 << 20


def test_two_slots_unless_a_third_is_worth_it() -> None:
    even = [Block("", (1 << 20,), 1.0)] * 20
    assert make_plan(even, link=1 << 20).slots == 2
    # With every fifth block staying, the four between must be copied while five compute.
    spread = make_plan(even, keep=4 << 20, link=0.8 * 2**20)
    assert spread.slots == 3
    assert spread.step_seconds == pytest.approx(20, rel=0.02)
    assert make_plan(even, keep=4 << 20, link=0.8 * 2**20, prefetch=1).step_seconds > 20 * 1.05


def test_without_prefetch_copies_and_computing_take_turns() -> None:
    plan = make_plan([Block("", (1 << 20,), 1.0)] * 10, prefetch=0, link=1 << 20)
    assert plan.slots == 1
    assert plan.step_seconds == pytest.approx(20)


def test_few_groups_stay_in_their_slots() -> None:
    plan = make_plan([Block("", (1 << 20,), 1.0)] * 2, keep=0, link=1 << 20)
    assert (len(plan.groups), plan.step_bytes, plan.step_seconds) == (2, 0, 2.0)


def test_the_report_says_what_stays_and_what_it_costs() -> None:
    sizes = [340 << 20] * 19 + [141 << 20] * 38
    blocks = [Block(f"blocks.{n}", (size,), 1e-2) for n, size in enumerate(sizes)]
    plan = make_plan(blocks, limit=4 * GB, blocks_per_group=2, prefetch=1)
    assert plan.report() == (
        "13 of 57 blocks stay on the GPU (2.6 GB), 44 are streamed in 22 groups (9.0 GB a step), two slots of 0.7 GB: "
        "3.9 GB of weights on the GPU at most. A step takes about 0.59 s: 0.57 s of computing beside 0.39 s of "
        "copying at 25 GB/s."
    )
    assert make_plan(blocks, limit=12 * GB).report() == "All 57 blocks stay on the GPU (11.5 GB)."
    assert (
        "Copying takes 0.50 s a step"
        in make_plan([Block(block.name, block.sizes) for block in blocks]).report()
    )


def test_too_little_memory_is_said_with_numbers() -> None:
    blocks = [Block(f"blocks.{n}", (300 << 20,)) for n in range(20)]
    with pytest.raises(SnugError, match=r"20 blocks .* 0\.5 GB of GPU memory .* at least 0\.6 GB"):
        make_plan(blocks, limit=GB // 2)
