"""Runs a model along an offload plan: has each block's weights on the device when it computes, and the next on
their way.

One rule keeps it right whatever happens: the slots hold the group that computes now and those that follow it, over
the end of a step to the start of the next. In a step that runs as planned, a slot is refilled when its group is done
and nothing else moves. After a step that was broken off, blocks that were left out or called in another order, the
same rule finds other groups missing and copies them then.
"""

from __future__ import annotations

import torch

from ..core.errors import SnugError
from .plan import OffloadPlan
from .slab import Source
from .transfer import Transfer


class GroupOffload:
    """The weights of one model, by blocks.

    plan: what stays and what is streamed. source: the tensors of each block, in the same sizes as in the plan; those
    of blocks that stay are where they compute already. transfer: not yet opened; it is closed with this.
    Around each block call `acquire` and `release`; blocks do not overlap one another. late_copies: copies that a
    block had to wait for because it did not follow the one before.

    Raises SnugError when `source` does not fit the plan, and whatever torch raises when memory runs out; nothing is
    kept then.
    """

    def __init__(self, plan: OffloadPlan, source: Source, transfer: Transfer) -> None:
        self.plan = plan
        self.late_copies = 0
        self._transfer = transfer
        self._group_of = {block: number for number, group in enumerate(plan.groups) for block in group.blocks}
        self._in_slot: list[int | None] = [None] * plan.slots
        self._waited: set[int] = set()  # slots whose copy was waited for since it was started
        self._source: Source | None = source  # None once it is closed: it holds on to the model
        try:
            # Ordinary tensors, which can be written to in and out of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                transfer.open(plan, source)
        except BaseException:
            self.close()
            raise

    def prefetch(self) -> None:
        """Starts the copies that the first block of a step needs, before it asks for them."""
        self._hold_from(0)

    def acquire(self, block: int) -> tuple[torch.Tensor, ...]:
        """A block's tensors on the device, in the order of `source`; valid until the block is released.

        Raises SnugError when the weights were freed.
        """
        if self._source is None:
            raise SnugError("These offloaded weights were freed; queue the workflow again.")
        group = self._group_of.get(block)
        if group is None:
            return tuple(self._source(block))
        if group not in self._in_slot:
            self.late_copies += 1
        self._hold_from(group)
        slot = self._in_slot.index(group)
        if slot not in self._waited:
            try:
                self._transfer.wait(slot)
            except BaseException:
                self._in_slot[slot] = None  # what did not arrive is copied again when it is asked for again
                raise
            self._waited.add(slot)
        return self._transfer.tensors(block, slot)

    def release(self, block: int) -> None:
        """The block is computed, or enqueued to be."""
        group = self._group_of.get(block)
        if self.is_open and group is not None and block == self.plan.groups[group].blocks[-1]:
            self._hold_from(group + 1)

    def copy_anew(self) -> None:
        """The weights have changed: what was copied is not used again, but copied when it is asked for."""
        self._in_slot = [None] * self.plan.slots

    @property
    def is_open(self) -> bool:
        return self._source is not None

    @property
    def slot_bytes(self) -> int:
        """What the slots take on the device now."""
        return self._transfer.slot_bytes

    def close(self) -> None:
        """Frees everything, on the device and on the host. May be called twice."""
        self._source = None
        self._transfer.close()

    def _hold_from(self, first: int) -> None:
        """Lets the slots hold the groups from `first` on, copying those that are missing."""
        count = len(self.plan.groups)
        wanted = [(first + ahead) % count for ahead in range(self.plan.slots)]
        free = [slot for slot, group in enumerate(self._in_slot) if group not in wanted]
        missing = [group for group in wanted if group not in self._in_slot]
        for slot, group in zip(free, missing, strict=True):
            self._in_slot[slot] = None  # until the copy is under way
            self._waited.discard(slot)
            self._transfer.release(slot)
            self._transfer.copy(group, slot)
            self._in_slot[slot] = group
