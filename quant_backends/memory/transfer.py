"""How groups of weights get to the device: asynchronously, with events both ways, or not at all.

A transfer is driven by `executor.GroupOffload` and owns the memory on both sides. All its calls come from one
thread, in the order in which work is enqueued on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from ..core.errors import SnugError
from .plan import OffloadPlan
from .slab import GroupLayout, HostBuffer, Source


class Transfer(Protocol):
    """device: where blocks compute. slot_bytes: what all slots take there now."""

    device: torch.device

    @property
    def slot_bytes(self) -> int: ...

    def open(self, plan: OffloadPlan, source: Source) -> None:
        """Makes the slots and what copies start from. Called once, before anything else."""
        ...

    def copy(self, group: int, slot: int) -> None:
        """Starts the copy of a group, after what was last released there; does not wait."""
        ...

    def wait(self, slot: int) -> None:
        """Whatever is computed from now on comes after the copy into `slot`."""
        ...

    def release(self, slot: int) -> None:
        """Whatever is copied into `slot` from now on comes after all that is being computed."""
        ...

    def tensors(self, block: int, slot: int) -> tuple[torch.Tensor, ...]:
        """A block's tensors as views of the slot that its group was copied into."""
        ...

    def close(self) -> None:
        """Frees both sides, once copies under way have ended. May be called twice."""
        ...


class DirectTransfer:
    """For blocks that compute where their weights are: nothing is copied, the tensors are the source's own."""

    device = torch.device("cpu")
    slot_bytes = 0

    def open(self, plan: OffloadPlan, source: Source) -> None:
        self._source: Source | None = source

    def copy(self, group: int, slot: int) -> None:
        pass

    def wait(self, slot: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def tensors(self, block: int, slot: int) -> tuple[torch.Tensor, ...]:
        assert self._source is not None
        return tuple(self._source(block))

    def close(self) -> None:
        self._source = None


class SlabTransfer:
    """What transfers from a slab have in common: all streamed bytes in one piece of host memory in the order of
    execution, the slots, and the views of them.

    on_staged: called with each block and its tensors in the slab as soon as they are there, so that the source can
    let go of its own; None when the source keeps them. A slab that the source's tensors lie in is used again.
    """

    def __init__(self, device: torch.device, pin: bool) -> None:
        self.device = device
        self.on_staged: Callable[[int, tuple[torch.Tensor, ...]], None] | None = None
        self._pin_for = device if pin else None
        self._host: HostBuffer | None = None
        self._layout: GroupLayout | None = None
        self._slots: list[torch.Tensor] = []
        self._views: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    @property
    def is_pinned(self) -> bool:
        return self._host is not None and self._host.is_pinned

    @property
    def slot_bytes(self) -> int:
        return sum(slot.numel() for slot in self._slots)

    def open(self, plan: OffloadPlan, source: Source) -> None:
        self._plan = plan
        layout = self._layout = GroupLayout(plan, source)
        self._slots = [
            torch.empty(plan.slot_bytes, dtype=torch.uint8, device=self.device) for _ in range(plan.slots)
        ]
        self._views = {
            (block, number): layout.views(block, slot)
            for number, slot in enumerate(self._slots)
            for block in plan.streamed
        }
        self._host = self._host_buffer(plan, layout)

    def _host_buffer(self, plan: OffloadPlan, layout: GroupLayout) -> HostBuffer:
        existing = layout.slab_of_before()
        slab = HostBuffer(plan.slab_bytes, existing=existing)
        for number, group in enumerate(plan.groups if existing is None else ()):
            group_bytes = slab.bytes.narrow(0, group.offset, group.nbytes)
            layout.fill(number, group_bytes)
            for block in group.blocks:
                if self.on_staged is not None:
                    self.on_staged(block, layout.views(block, group_bytes))
        if self._pin_for is not None:  # now that weights which moved have left the memory where they were
            slab.pin(self._pin_for)
        return slab

    def _staged(self, group: int, slot: int) -> torch.Tensor:
        """uint8 [group.nbytes]: what a copy of the group reads."""
        assert self._host is not None, "the transfer is not open"
        return self._host.bytes.narrow(0, self._plan.groups[group].offset, self._plan.groups[group].nbytes)

    def tensors(self, block: int, slot: int) -> tuple[torch.Tensor, ...]:
        return self._views[block, slot]

    def close(self) -> None:
        self._views.clear()
        self._slots.clear()
        self._layout = self.on_staged = None  # they hold on to the model
        if self._host is not None:
            self._host.close()
            self._host = None


class StreamTransfer(SlabTransfer):
    """Copies on a stream of its own, for devices with streams and events (CUDA, ROCm, XPU).

    device: with its index. pin: whether the slab is pinned; copies from pageable memory block the caller and are
    slower. Raises SnugError when torch cannot use the device.
    """

    def __init__(self, device: torch.device, pin: bool = True) -> None:
        super().__init__(device, pin)
        self._module: Any = torch.get_device_module(device)
        if not self._module.is_available():
            raise SnugError(f"Weights cannot be streamed to {device}: torch finds no such device.")
        self._stream: Any = self._module.Stream(device=device)
        self._copied: list[Any] = []
        self._released: list[Any] = []

    def open(self, plan: OffloadPlan, source: Source) -> None:
        super().open(plan, source)
        self._copied = [self._module.Event() for _ in self._slots]
        self._released = [self._module.Event() for _ in self._slots]
        for number, slot in enumerate(self._slots):
            slot.record_stream(self._stream)  # it was allocated for the stream that computes
            self.release(number)  # its memory may still be in use by whoever had it before

    def copy(self, group: int, slot: int) -> None:
        source = self._staged(group, slot)
        with self._module.stream(self._stream):
            self._stream.wait_event(self._released[slot])
            self._slots[slot].narrow(0, 0, source.numel()).copy_(source, non_blocking=True)
            self._copied[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        self._module.current_stream(self.device).wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        self._released[slot].record(self._module.current_stream(self.device))

    def close(self) -> None:
        self._stream.synchronize()
        super().close()


class DiskTransfer(StreamTransfer):
    """Copies weights that stay in their files: a thread reads each group from the mapped file into a small pinned
    buffer, one part of it for each slot, and copies it from there. Where the disk is slower than the link, steps
    take as long as reading does.
    """

    def __init__(self, device: torch.device, pin: bool = True) -> None:
        super().__init__(device, pin)
        self._reader = ThreadPoolExecutor(1, "snug-offload")
        self._read: dict[int, Future[None]] = {}  # by slot

    def _host_buffer(self, plan: OffloadPlan, layout: GroupLayout) -> HostBuffer:
        return HostBuffer(plan.slots * plan.slot_bytes, self._pin_for)

    def _staged(self, group: int, slot: int) -> torch.Tensor:
        assert self._host is not None and self._layout is not None, "the transfer is not open"
        part = self._host.bytes.narrow(0, slot * self._plan.slot_bytes, self._plan.groups[group].nbytes)
        self._copied[slot].synchronize()  # the copy before may still read from it
        self._layout.fill(group, part)
        return part

    def copy(self, group: int, slot: int) -> None:
        self._read[slot] = self._reader.submit(super().copy, group, slot)

    def wait(self, slot: int) -> None:
        self._read[slot].result()  # the event that is waited for is recorded only then
        super().wait(slot)

    def release(self, slot: int) -> None:
        if slot in self._read:  # a copy that nobody waited for must not wait for what comes after it
            self._read[slot].exception()
        super().release(slot)

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        super().close()
