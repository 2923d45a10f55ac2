"""What takes a device's memory, from the counters that there are. No ComfyUI, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """Counters of one device, in bytes.

    total, free: by the driver or the operating system. allocated: what this process uses, reserved: that and what
    torch keeps for later; on a CPU both are the process's resident memory. pages: weights that ComfyUI's dynamic VRAM
    holds beside torch. weights: of loaded models, without those pages. retries, ooms: how often torch freed its cache
    and asked again, and how often it ran out of memory, since the process started; 0 where nobody counts.
    """

    name: str
    title: str
    total: int
    free: int
    allocated: int
    reserved: int
    weights: int
    pages: int = 0
    is_gpu: bool = True
    retries: int = 0
    ooms: int = 0


@dataclass(frozen=True, slots=True)
class DeviceParts:
    """The parts of a device's memory, in bytes; together they are `total`.

    activations: what this process uses beside weights (on a CPU the program itself, too). cache: what torch keeps for
    later. other: the driver, the context and other processes. retries, ooms: as in DeviceReading.
    """

    name: str
    title: str
    total: int
    weights: int
    pages: int
    activations: int
    cache: int
    other: int
    free: int
    is_gpu: bool = True
    retries: int = 0
    ooms: int = 0

    @property
    def used(self) -> int:
        """By this process, without what torch keeps for later."""
        return self.weights + self.pages + self.activations


def split(reading: DeviceReading) -> DeviceParts:
    """Counters are read one after the other and disagree a little: each part takes at most what the others left."""
    allocated = min(reading.allocated, reading.total)
    weights = min(reading.weights, allocated)
    left = reading.total - allocated
    cache = min(max(0, reading.reserved - reading.allocated), left)
    pages = min(reading.pages, left - cache)
    left -= cache + pages
    # Mapped files count as available to the system and as resident to the process.
    free = max(0, min(reading.free, left))
    return DeviceParts(
        reading.name,
        reading.title,
        reading.total,
        weights,
        pages,
        allocated - weights,
        cache,
        left - free,
        free,
        reading.is_gpu,
        reading.retries,
        reading.ooms,
    )


def dynamic_pages(total: int, reserved: int) -> int:
    """Bytes of ComfyUI's dynamic VRAM beside torch, whose own `reserved` bytes its `total` includes."""
    return max(0, total - reserved)


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A loaded model, in bytes. formats: the largest part first. last_node: the node that used it last."""

    name: str
    device: str
    formats: tuple[str, ...]
    on_device: int
    offloaded: int
    pinned: int
    total: int
    is_paged: bool = False
    last_node: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """time: seconds since the epoch."""

    time: float
    devices: tuple[DeviceParts, ...]
    models: tuple[ModelRow, ...]
    running: str | None = None
