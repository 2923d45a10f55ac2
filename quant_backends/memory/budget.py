"""What of each model is kept on the device so that no stage of a workflow takes more memory than the user allows.

A workflow runs in stages: text encoding, sampling, decoding. In each, one model is used, with what is needed beside it
and the memory of computing; what earlier stages left on the device makes way. When they do not fit, the model streams a
part of its weights, or the image is decoded in tiles.

Sizes are in bytes; in texts a GB is 1024 MB of 1024 KB each, as in ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from ..core.errors import SnugError
from .plan import size_text

GIGABYTE = 2**30
# Sides of the square tiles that decoding may be done in, in pixels, the largest first.
TILE_SIZES = (2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 64)


@dataclass(frozen=True, slots=True)
class Component:
    """One model's weights. detail: what it is and its formats, for the report; nbytes: of its weights;
    least: what they take on the device at least when they are streamed, None when they cannot be."""

    name: str
    detail: str
    nbytes: int
    least: int | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """What is on the device together.

    computing: bytes beside the weights; work: what is computed, for the report; beside: models that stay whole;
    tiles: (side in pixels, bytes of computing, less than for all) of the tiles that the work can be cut into, the
    largest first.
    """

    name: str
    component: Component
    computing: int
    work: str = ""
    beside: tuple[Component, ...] = ()
    tiles: tuple[tuple[int, int], ...] = ()

    @property
    def other_weights(self) -> int:
        return sum(component.nbytes for component in self.beside)

    @property
    def whole(self) -> int:
        """Bytes with all weights on the device and the work not cut."""
        return self.component.nbytes + self.other_weights + self.computing

    @property
    def least(self) -> int:
        """Bytes below which the stage cannot run."""
        component = self.component
        weights = component.nbytes if component.least is None else min(component.least, component.nbytes)
        return weights + self.other_weights + min([self.computing, *(nbytes for _, nbytes in self.tiles)])


@dataclass(frozen=True, slots=True)
class StagePlan:
    """limit: bytes of the component's weights on the device, None when they stay whole; tile: side in pixels of the
    tiles that the work is cut into, None for none; computing: bytes, with such tiles."""

    stage: Stage
    limit: int | None
    tile: int | None
    computing: int

    @property
    def weights(self) -> int:
        """Bytes of the component's weights on the device at most."""
        return self.stage.component.nbytes if self.limit is None else self.limit

    @property
    def peak(self) -> int:
        return self.weights + self.stage.other_weights + self.computing


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """budget: what all stages stay within; reserve: the part of it that is left to others, such as the desktop."""

    budget: int
    reserve: int
    stages: tuple[StagePlan, ...]

    @property
    def needed_for_whole(self) -> int:
        """The budget with which nothing is streamed or cut into tiles."""
        return max(plan.stage.whole for plan in self.stages) + self.reserve

    def room(self, plan: StagePlan) -> int:
        """Bytes that a stage leaves to models that it does not use."""
        return self.budget - self.reserve - plan.peak

    def report(self, notes: Mapping[str, str]) -> str:
        """A table of the stages. notes: by the name of a component, how it is streamed and what that costs."""
        lines = [f"Memory budget: {size_text(self.budget)} of GPU memory."]
        for plan in self.stages:
            lines += ["", *self._rows(plan, notes)]
        if any(plan.limit is not None or plan.tile is not None for plan in self.stages):
            lines += [
                "",
                f"A budget of {_round_up(self.needed_for_whole)} keeps everything whole. Faster within this one: "
                "fewer bits per weight (a smaller file, or Layerwise Casting), a lower resolution, a smaller batch.",
            ]
        return "\n".join(lines)

    def _rows(self, plan: StagePlan, notes: Mapping[str, str]) -> list[str]:
        stage = plan.stage
        kept = "stays on the GPU"
        fate = kept if plan.limit is None else f"streamed, of {size_text(stage.component.nbytes)}"
        work = stage.work if plan.tile is None else f"{stage.work}, in tiles of {plan.tile} pixels"
        table = [
            (_labelled(stage.component), plan.weights, fate),
            *((_labelled(component), component.nbytes, kept) for component in stage.beside),
            ("computing", plan.computing, work),
            ("reserve", self.reserve, "for the desktop and other programs"),
        ]
        width = max(len(label) for label, _, _ in table)
        rows = [f"{stage.name}: {size_text(plan.peak + self.reserve)} at most"]
        rows += [
            f"  {label:<{width}}  {size_text(nbytes):>8}  {text}".rstrip() for label, nbytes, text in table
        ]
        note = notes.get(stage.component.name)
        return [*rows, f"  {note}"] if note else rows


def plan_budget(budget: int, reserve: int, stages: Sequence[Stage]) -> BudgetPlan:
    """The plan that streams least within the budget.

    budget, reserve: as in BudgetPlan.
    Raises SnugError when a stage cannot run within the budget, with the one that would be enough for all.
    """
    available = budget - reserve
    short = [stage for stage in stages if stage.least > available]
    if short:
        raise SnugError(_too_small(budget, reserve, max(short, key=lambda stage: stage.least)))
    return BudgetPlan(budget, reserve, tuple(_plan_stage(stage, available) for stage in stages))


def _plan_stage(stage: Stage, available: int) -> StagePlan:
    if stage.whole <= available:
        return StagePlan(stage, None, None, stage.computing)
    component, computing, tile = stage.component, stage.computing, None
    if stage.tiles:  # before streaming, which costs more
        sizes = dict(stage.tiles)
        tile = largest_tile(
            sizes.__getitem__, available - component.nbytes - stage.other_weights, list(sizes)
        )
        computing = sizes[tile]
    limit = available - stage.other_weights - computing
    return StagePlan(stage, limit if limit < component.nbytes else None, tile, computing)


def largest_tile(nbytes: Callable[[int], int], room: int, sizes: Sequence[int] = TILE_SIZES) -> int:
    """The largest tile whose computing takes at most `room` bytes, or the smallest one.

    nbytes: of computing a tile of so many pixels per side; sizes: in pixels, the largest first.
    """
    return next((size for size in sizes if nbytes(size) <= room), sizes[-1])


def _labelled(component: Component) -> str:
    return f"{component.name} ({component.detail})" if component.detail else component.name


def _round_up(nbytes: int) -> str:
    """To tenths of a GB, as budgets are given."""
    return f"{ceil(10 * nbytes / GIGABYTE) / 10:.1f} GB"


def _too_small(budget: int, reserve: int, stage: Stage) -> str:
    least = stage.least
    computing = min([stage.computing, *(nbytes for _, nbytes in stage.tiles)])
    beside = f", {size_text(stage.other_weights)} for {_names(stage.beside)}" if stage.beside else ""
    streamed = " when streamed" if stage.component.least is not None else ""
    work = f" ({stage.work})" if stage.work else ""
    return (
        f"A memory budget of {size_text(budget)} is too small: {stage.name.lower()} needs at least "
        f"{_round_up(least + reserve)}, of which {size_text(least - computing - stage.other_weights)} for the weights "
        f"of {_labelled(stage.component)}{streamed}{beside}, {size_text(computing)} for computing{work} and "
        f"{size_text(reserve)} in reserve; allow that much, choose a lower resolution or a smaller batch, or use a "
        "file with fewer bits per weight or Layerwise Casting (Snug)."
    )


def _names(components: Sequence[Component]) -> str:
    return " and ".join(component.name for component in components)
