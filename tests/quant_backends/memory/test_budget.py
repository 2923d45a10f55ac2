"""Plans within a memory budget: never above it, never streaming more with more memory, clear when nothing fits."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.memory.budget import (
    GIGABYTE,
    TILE_SIZES,
    BudgetPlan,
    Component,
    Stage,
    largest_tile,
    plan_budget,
)

nbytes = st.integers(0, 40 * GIGABYTE)
components = st.builds(
    Component, st.just("model"), st.just("Flux, Q4_0"), nbytes, st.none() | st.integers(0, GIGABYTE)
)
beside = st.lists(st.builds(Component, st.just("ControlNet"), st.just(""), nbytes), max_size=2).map(tuple)


@st.composite
def any_stage(draw: st.DrawFn) -> Stage:
    sizes = sorted(draw(st.sets(nbytes, max_size=5)) | {draw(nbytes)}, reverse=True)  # whole, then in tiles
    tiles = tuple(zip(TILE_SIZES, sizes[1:], strict=False))
    return Stage("Sampling", draw(components), sizes[0], "1024 × 1024", draw(beside), tiles)


stages = st.lists(any_stage(), min_size=1, max_size=3)


def flux(least: int | None = GIGABYTE) -> Component:
    return Component("model", "Flux, Q8_0", 12 * GIGABYTE, least)


@given(stages, st.integers(1, 100 * GIGABYTE), st.integers(0, GIGABYTE))
def test_never_above_the_budget(stages: list[Stage], budget: int, reserve: int) -> None:
    try:
        plan = plan_budget(budget, reserve, stages)
    except SnugError as error:
        least = max(stage.least for stage in stages) + reserve
        assert least > budget
        needed = float(re.findall(r"at least ([\d.]+) GB", str(error))[0])
        assert 0 <= needed * GIGABYTE - least <= 0.11 * GIGABYTE, "enough, and hardly more"
        return
    assert all(stage.least + reserve <= budget for stage in stages)
    for stage_plan in plan.stages:
        stage = stage_plan.stage
        assert stage_plan.peak + reserve + plan.room(stage_plan) == budget
        assert plan.room(stage_plan) >= 0
        if stage_plan.limit is not None:
            assert stage.component.least is not None
            assert min(stage.component.least, stage.component.nbytes) <= stage_plan.limit
            assert stage_plan.limit <= stage.component.nbytes
    whole = all(stage.whole + reserve <= budget for stage in stages)
    assert whole == all(entry.limit is None and entry.tile is None for entry in plan.stages)
    assert whole == (plan.needed_for_whole <= budget)
    assert plan.report({})


@given(stages, st.integers(1, 100 * GIGABYTE), st.integers(1, 50 * GIGABYTE))
def test_more_memory_never_streams_more(stages: list[Stage], budget: int, more: int) -> None:
    assume(all(stage.least <= budget for stage in stages))
    small, large = plan_budget(budget, 0, stages), plan_budget(budget + more, 0, stages)
    for one, other in zip(small.stages, large.stages, strict=True):
        assert one.weights <= other.weights
        assert (one.tile or TILE_SIZES[0] + 1) <= (other.tile or TILE_SIZES[0] + 1)
        assert one.limit is not None or other.limit is None


def test_a_stage_gets_what_is_left_beside_its_neighbours() -> None:
    control = Component("ControlNet", "", 2 * GIGABYTE)
    stage = Stage("Sampling", flux(), GIGABYTE, beside=(control,))
    [plan] = plan_budget(8 * GIGABYTE, GIGABYTE // 2, [stage]).stages
    assert plan.limit == 8 * GIGABYTE - GIGABYTE // 2 - GIGABYTE - 2 * GIGABYTE
    [plan] = plan_budget(16 * GIGABYTE, GIGABYTE // 2, [stage]).stages
    assert plan.limit is None


def test_decoding_is_cut_into_the_largest_tiles_that_fit() -> None:
    decode = tuple((size, size * size * 2048) for size in TILE_SIZES)
    stage = Stage("Decoding", Component("VAE", "", GIGABYTE // 4), 32 * GIGABYTE, tiles=decode)
    [plan] = plan_budget(3 * GIGABYTE, 0, [stage]).stages
    assert (plan.limit, plan.tile) == (None, 1024)
    [plan] = plan_budget(GIGABYTE, 0, [stage]).stages
    assert plan.tile == 512
    assert largest_tile(dict(decode).__getitem__, 0) == 64


def report_of(plan: BudgetPlan) -> list[str]:
    return plan.report({"model": "38 of 57 blocks stay on the GPU."}).splitlines()


def test_report() -> None:
    sampling = Stage("Sampling", flux(), 2 * GIGABYTE, "1024 × 1024")
    encoding = Stage("Text encoding", Component("text encoders", "F16", 5 * GIGABYTE), GIGABYTE)
    assert report_of(plan_budget(8 * GIGABYTE, GIGABYTE // 2, [encoding, sampling])) == [
        "Memory budget: 8.0 GB of GPU memory.",
        "",
        "Text encoding: 6.5 GB at most",
        "  text encoders (F16)    5.0 GB  stays on the GPU",
        "  computing              1.0 GB",
        "  reserve                0.5 GB  for the desktop and other programs",
        "",
        "Sampling: 8.0 GB at most",
        "  model (Flux, Q8_0)    5.5 GB  streamed, of 12.0 GB",
        "  computing             2.0 GB  1024 × 1024",
        "  reserve               0.5 GB  for the desktop and other programs",
        "  38 of 57 blocks stay on the GPU.",
        "",
        "A budget of 14.5 GB keeps everything whole. Faster within this one: fewer bits per weight (a smaller file, "
        "or Layerwise Casting), a lower resolution, a smaller batch.",
    ]
    whole = "\n".join(report_of(plan_budget(15 * GIGABYTE, 0, [sampling])))
    assert "streamed" not in whole and "Faster" not in whole


@pytest.mark.parametrize("least", [GIGABYTE, None])
def test_too_small_a_budget_says_what_would_do(least: int | None) -> None:
    control = Component("ControlNet", "", 2 * GIGABYTE)
    stage = Stage("Sampling", flux(least), 3 * GIGABYTE, "2048 × 2048", beside=(control,))
    with pytest.raises(SnugError) as error:
        plan_budget(2 * GIGABYTE, GIGABYTE // 2, [stage])
    needed = 6.5 if least else 17.5
    assert str(error.value).startswith(
        f"A memory budget of 2.0 GB is too small: sampling needs at least {needed} GB, of which "
        f"{1 if least else 12}.0 GB for the weights of model (Flux, Q8_0){' when streamed' if least else ''}, "
        "2.0 GB for ControlNet, 3.0 GB for computing (2048 × 2048) and 0.5 GB in reserve; allow that much"
    )
    plan_budget(round(needed * GIGABYTE), GIGABYTE // 2, [stage])
