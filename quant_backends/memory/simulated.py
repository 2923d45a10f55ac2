"""A device that exists in time only: copies and computing take what they would, on a clock of their own.

It runs the same executor as a real device, for tests and for what-if tables. Bytes do move, on the CPU. They
are read as early and arrive as late as on a real device: whoever reads a slot without waiting for it finds poison
there, and who writes to weights that are on their way is not heard.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .executor import GroupOffload
from .plan import LINK_BYTES_PER_SECOND, WARM_UP_STEPS, OffloadPlan
from .slab import Source
from .transfer import SlabTransfer

POISON = 0xA5


@dataclass(frozen=True, slots=True)
class Event:
    """kind: "copy", "compute" or "stall" (computing waits for a copy); of: number of the group, or of the block;
    start and end: seconds on the device's clock.
    """

    kind: str
    of: int
    start: float
    end: float


@dataclass(slots=True)
class SimulatedDevice:
    """One link and one queue of computing, which several transfers can share."""

    link_bytes_per_second: float = LINK_BYTES_PER_SECOND
    now: float = 0.0  # when all that was enqueued so far is computed
    link_free: float = 0.0
    events: list[Event] = field(default_factory=list)

    def compute(self, block: int, seconds: float) -> None:
        self.events.append(Event("compute", block, self.now, self.now + seconds))
        self.now += seconds

    def copy(self, group: int, nbytes: int, after: float) -> float:
        """The time at which the copy ends."""
        start = max(self.link_free, after)
        self.link_free = start + nbytes / self.link_bytes_per_second
        self.events.append(Event("copy", group, start, self.link_free))
        return self.link_free

    def wait(self, group: int, until: float) -> None:
        if until > self.now:
            self.events.append(Event("stall", group, self.now, until))
            self.now = until


class SimulatedTransfer(SlabTransfer):
    """Copies on a simulated device. most_ahead: the most groups that were on their way, or there already, while an
    earlier one computed; waits: how often `wait` was called.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__(torch.device("cpu"), pin=False)
        self.clock = device
        self.most_ahead = 0
        self.waits = 0
        self._copied: dict[int, tuple[int, float]] = {}  # by slot: the group, and when its copy ends
        self._on_the_way: list[torch.Tensor] = []  # by slot: the bytes as they were when the copy began
        self._waited: set[int] = set()
        self._released: dict[int, float] = {}

    def open(self, plan: OffloadPlan, source: Source) -> None:
        super().open(plan, source)
        self._on_the_way = [torch.empty_like(slot) for slot in self._slots]

    def copy(self, group: int, slot: int) -> None:
        assert slot not in self._copied, f"slot {slot} is copied into before it was released"
        source = self._staged(group, slot)
        self._slots[slot].fill_(POISON)
        self._on_the_way[slot][: source.numel()] = source
        self._copied[slot] = (group, self.clock.copy(group, source.numel(), self._released.get(slot, 0.0)))

    def wait(self, slot: int) -> None:
        group, copied = self._copied[slot]
        nbytes = self._plan.groups[group].nbytes
        self._slots[slot][:nbytes] = self._on_the_way[slot][:nbytes]
        self.waits += 1
        self._waited.add(slot)
        self.most_ahead = max(self.most_ahead, len(self._copied) - len(self._waited))
        self.clock.wait(group, copied)

    def release(self, slot: int) -> None:
        self._copied.pop(slot, None)
        self._waited.discard(slot)
        self._released[slot] = self.clock.now

    def close(self) -> None:
        self._on_the_way.clear()
        super().close()


def simulate(plan: OffloadPlan) -> float:
    """Seconds of a step in the steady state, by running the executor on a simulated device."""
    sizes = [block.sizes for block in plan.blocks]
    device = SimulatedDevice(plan.link)
    transfer = SimulatedTransfer(device)
    offload = GroupOffload(
        plan, lambda block: [torch.empty(size, dtype=torch.uint8) for size in sizes[block]], transfer
    )
    start = 0.0
    for step in range(2 * WARM_UP_STEPS):
        start = device.now if step == WARM_UP_STEPS else start
        for block, spec in enumerate(plan.blocks):
            offload.acquire(block)
            device.compute(block, spec.seconds)
            offload.release(block)
    offload.close()
    return (device.now - start) / WARM_UP_STEPS
