"""Whether a model fits on a device, and what of it would be offloaded: from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import SnugError
from ..memory.plan import Block, make_plan, size_text


@dataclass(frozen=True, slots=True)
class Device:
    """name: for people. total, free: bytes, free counting what ComfyUI can unload. reserve: bytes that are left to
    others. is_gpu: whether weights are moved there."""

    name: str
    total: int
    free: int
    reserve: int
    is_gpu: bool


@dataclass(frozen=True, slots=True)
class Demand:
    """weights: bytes when loaded; blocks: those of them that can be offloaded one by one, others: the rest. computing:
    bytes beside them, None where it is not known; work: what is computed, for people."""

    blocks: tuple[Block, ...]
    others: int
    computing: int | None
    work: str

    @property
    def weights(self) -> int:
        return sum(sum(block.sizes) for block in self.blocks) + self.others


@dataclass(frozen=True, slots=True)
class Fit:
    """offloaded: bytes of weights that do not fit beside computing. offloaded_blocks: how many blocks that is, from the
    last one. streaming: how Group Offload would run the model then, or why it cannot; empty when everything fits."""

    device: Device
    demand: Demand
    offloaded: int
    offloaded_blocks: int
    streaming: str

    @property
    def needed(self) -> int:
        """Bytes with all weights on the device."""
        return self.demand.weights + (self.demand.computing or 0) + self.device.reserve

    @property
    def verdict(self) -> str:
        """In a sentence or two."""
        device, demand = self.device, self.demand
        room = f"{size_text(device.free)} of {size_text(device.total)} are free on {device.name}"
        unknown = (
            "" if demand.computing is not None else " What computing takes is not known and not counted."
        )
        if not self.offloaded:
            return f"It fits: {size_text(self.needed)} are needed, {room}. Nothing is offloaded.{unknown}"
        if not device.is_gpu:
            return (
                f"It does not fit: {size_text(self.needed)} are needed, {room}. The system would swap, or read "
                f"weights from the file again and again.{unknown}"
            )
        total = len(demand.blocks)
        blocks = f", about {self.offloaded_blocks} of {total} blocks" if total else ""
        return (
            f"It does not fit whole: {size_text(self.needed)} are needed, {room}. ComfyUI would offload "
            f"{size_text(self.offloaded)} of {size_text(demand.weights)} of weights{blocks}.{unknown}"
        )


def estimate_fit(device: Device, demand: Demand) -> Fit:
    """Fits `demand` into what is free on `device`."""
    room = max(0, device.free - device.reserve - (demand.computing or 0))
    offloaded = max(0, demand.weights - room)
    count, left = 0, offloaded
    for block in reversed(demand.blocks):
        if left <= 0:
            break
        left -= sum(block.sizes)
        count += 1
    streaming = ""
    if offloaded and device.is_gpu:
        streaming = _streaming(demand.blocks, room - demand.others)
    return Fit(device, demand, offloaded, count, streaming)


def _streaming(blocks: Sequence[Block], limit: int) -> str:
    if not blocks:
        return "The model has no blocks that could be offloaded one by one."
    if limit <= 0:
        return "Group Offload cannot run it either: layers outside of its blocks do not fit beside computing."
    try:
        return f"With Group Offload: {make_plan(blocks, limit=limit).report()}"
    except SnugError as error:
        return str(error)
