"""Which blocks of a model stay on the device and which are streamed to it, step after step, by order and sizes alone.

Streamed blocks are copied in groups, through slots that take turns, while blocks before them compute. What stays is
spread evenly between what is streamed, so that every copy has computing to hide behind. All streamed tensors lie in
one slab of host memory in the order of execution: a group is one copy of one range of bytes.

Sizes are in bytes and times in seconds; in texts a GB is 1024 MB of 1024 KB each, as in ComfyUI.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..core.errors import SnugError

# Alignment of every tensor: that of CUDA's own allocations, more than any kernel asks for.
ALIGNMENT = 512
# What a PCIe 4.0 link with 16 lanes moves from pinned memory.
LINK_BYTES_PER_SECOND = 25e9
# Sizes tried as the largest one that is streamed; models have few kinds of blocks.
SIZES_TRIED = 8
# What is this close to the fastest plan counts as fast as it.
AS_FAST = 1.02
# Steps until copies and computing have found their rhythm, however uneven the blocks.
WARM_UP_STEPS = 4


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Block:
    """sizes: bytes of each of its tensors; seconds: what computing it takes on the device, 0 when unknown."""

    name: str
    sizes: tuple[int, ...]
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """With every tensor aligned."""
        return sum(map(aligned, self.sizes))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of each tensor from the block's start."""
        return tuple(accumulate(map(aligned, self.sizes[:-1]), initial=0))[: len(self.sizes)]


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks that are copied together: their numbers, ascending, and the range of the slab that they fill."""

    blocks: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """blocks: in the order of execution; groups: of those that are streamed, in the same order; slots: how many
    groups the device has room for at a time; link: bytes per second from host to device.
    """

    blocks: tuple[Block, ...]
    groups: tuple[Group, ...]
    slots: int
    link: float

    @property
    def streamed(self) -> frozenset[int]:
        return frozenset(index for group in self.groups for index in group.blocks)

    @property
    def resident_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks) - self.slab_bytes

    @property
    def slab_bytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    @property
    def slot_bytes(self) -> int:
        return max((group.nbytes for group in self.groups), default=0)

    @property
    def device_bytes(self) -> int:
        """The most that weights take on the device."""
        return self.resident_bytes + self.slots * self.slot_bytes

    @property
    def step_bytes(self) -> int:
        """Copied in each step; groups that all have a slot of their own are copied once."""
        return self.slab_bytes if len(self.groups) > self.slots else 0

    @property
    def compute_seconds(self) -> float:
        return sum(block.seconds for block in self.blocks)

    @property
    def transfer_seconds(self) -> float:
        return self.step_bytes / self.link

    @property
    def step_seconds(self) -> float:
        """What a step takes once copies and computing have found their rhythm; never less than either alone."""
        return _step_seconds(self, [block.seconds for block in self.blocks])

    def report(self) -> str:
        """The plan in a sentence or three."""
        count, total = len(self.blocks) - len(self.streamed), len(self.blocks)
        if not self.groups:
            return f"All {total} blocks stay on the GPU ({size_text(self.resident_bytes)})."
        slots = {1: "one slot", 2: "two slots", 3: "three slots"}.get(self.slots, f"{self.slots} slots")
        kept = (
            f"{count} of {total} blocks stay on the GPU ({size_text(self.resident_bytes)}), {total - count}"
        )
        text = (
            f"{kept if count else f'All {total} blocks'} are streamed in {len(self.groups)} groups "
            f"({size_text(self.step_bytes)} a step), {slots} of {size_text(self.slot_bytes)}: "
            f"{size_text(self.device_bytes)} of weights on the GPU at most."
        )
        if not self.compute_seconds:
            return f"{text} Copying takes {self.transfer_seconds:.2f} s a step at {self.link / 1e9:.0f} GB/s."
        return (
            f"{text} A step takes about {self.step_seconds:.2f} s: {self.compute_seconds:.2f} s of computing beside "
            f"{self.transfer_seconds:.2f} s of copying at {self.link / 1e9:.0f} GB/s."
        )


def make_plan(
    blocks: Sequence[Block],
    *,
    keep: int | None = None,
    limit: int | None = None,
    blocks_per_group: int = 1,
    prefetch: int | None = None,
    link: float = LINK_BYTES_PER_SECOND,
) -> OffloadPlan:
    """The plan within the limits that takes the least memory of those that are about as fast as the fastest.

    blocks: in the order of execution.
    keep: at most so many bytes of blocks stay on the device.
    limit: weights take at most so many bytes there, slots included.
    With neither, every block is streamed.
    blocks_per_group: the most blocks that are copied at once.
    prefetch: groups that are copied ahead of the one that computes, 0: none; None: one, or two where that is faster.

    Raises SnugError when the blocks cannot be run within `limit`.
    """
    keep = 0 if keep is None and limit is None else keep
    plans: list[OffloadPlan] = []
    for ahead in (1, 2) if prefetch is None else (prefetch,):
        for largest in _sizes_to_try(blocks):
            found = _keep_most(blocks, largest, keep, limit, blocks_per_group, ahead + 1, link)
            plans += [found] if found else []
    if not plans:
        least = least_limit(blocks, blocks_per_group, prefetch)
        raise SnugError(
            f"The model's {len(blocks)} blocks cannot be run with {size_text(limit or 0)} of GPU memory for their "
            f"weights: streaming needs at least {size_text(least)}; allow that much, or choose fewer blocks per group."
        )
    costs = [_cost(plan) for plan in plans]
    fast = [plan for plan, cost in zip(plans, costs, strict=True) if cost <= AS_FAST * min(costs)]
    return min(fast, key=lambda plan: plan.device_bytes)


def least_limit(blocks: Sequence[Block], blocks_per_group: int = 1, prefetch: int | None = None) -> int:
    """The smallest `limit` with which `make_plan` finds a plan, unless all blocks together take less."""
    slots = 2 if prefetch is None else prefetch + 1
    plans = (
        _layout(blocks, _spread(blocks, largest, 1), blocks_per_group, slots, LINK_BYTES_PER_SECOND)
        for largest in _sizes_to_try(blocks)
    )
    return min(plan.device_bytes for plan in plans)


def _keep_most(
    blocks: Sequence[Block],
    largest: int,
    keep: int | None,
    limit: int | None,
    blocks_per_group: int,
    slots: int,
    link: float,
) -> OffloadPlan | None:
    """The plan within the limits that streams least, no block of more than `largest` bytes, if there is one."""

    def plan(count: int) -> OffloadPlan:
        return _layout(blocks, _spread(blocks, largest, count / len(blocks)), blocks_per_group, slots, link)

    def fits(count: int) -> bool:
        made = plan(count)
        fits_keep = keep is None or made.resident_bytes <= keep
        return fits_keep and (limit is None or made.device_bytes <= limit)

    if not blocks or fits(0):
        return _layout(blocks, (), blocks_per_group, slots, link)
    if not fits(len(blocks)):
        return None
    return plan(bisect_left(range(len(blocks)), True, key=fits))


def _sizes_to_try(blocks: Sequence[Block]) -> list[int]:
    """Sizes above which blocks always stay: the slots of a model with one huge block would take more than it."""
    sizes = sorted({block.nbytes for block in blocks}, reverse=True)
    step = -(-len(sizes) // SIZES_TRIED) or 1
    return sizes[::step] or [0]


def _spread(blocks: Sequence[Block], largest: int, share: float) -> list[int]:
    """Numbers of blocks of at most `largest` bytes whose bytes stay close to `share` of all bytes so far."""
    chosen, owed = [], 0.0
    for index, block in enumerate(blocks):
        if 0 < block.nbytes <= largest:
            owed += share * block.nbytes
            if owed >= block.nbytes / 2:
                chosen.append(index)
                owed -= block.nbytes
    return chosen


def _layout(
    blocks: Sequence[Block], streamed: Sequence[int], blocks_per_group: int, slots: int, link: float
) -> OffloadPlan:
    count = -(-len(streamed) // blocks_per_group)
    groups, offset = [], 0
    for number in range(count):
        first, last = (len(streamed) * edge // count for edge in (number, number + 1))
        members = tuple(streamed[first:last])
        nbytes = sum(blocks[index].nbytes for index in members)
        groups.append(Group(members, offset, nbytes))
        offset += nbytes
    return OffloadPlan(tuple(blocks), tuple(groups), min(slots, count), link)


def _cost(plan: OffloadPlan) -> float:
    """Step time; where nothing is known of computing, it is taken to go with the bytes and to last as long."""
    seconds = [block.seconds or block.nbytes / plan.link for block in plan.blocks]
    return _step_seconds(plan, seconds)


def _step_seconds(plan: OffloadPlan, seconds: Sequence[float]) -> float:
    """The length of a step in the steady state: copy n starts when the link is free and group n - slots is done."""
    if not plan.step_bytes:
        return sum(seconds)
    first = {group.blocks[0]: group.nbytes for group in plan.groups}
    last = {group.blocks[-1] for group in plan.groups}
    released = [0.0] * plan.slots  # when the groups before were done, the newest at the end
    now = link = start = 0.0
    for step in range(2 * WARM_UP_STEPS):
        start = now if step == WARM_UP_STEPS else start
        for index, length in enumerate(seconds):
            if index in first:
                link = max(link, released[-plan.slots]) + first[index] / plan.link
                now = max(now, link)
            now += length
            if index in last:
                released.append(now)
    return (now - start) / WARM_UP_STEPS


def size_text(nbytes: float) -> str:
    """For people, in the units that ComfyUI counts in."""
    return f"{nbytes / 2**30:.1f} GB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MB"
