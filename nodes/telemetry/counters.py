"""Counters of memory in use with their peaks, exact where torch or the system keeps them."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management as management
import psutil
import torch

from .accounting import dynamic_pages
from .record import Counter

CPU = "cpu"


class ResidentMemory:
    """RAM of this process. Linux keeps its peak and lets a process set it back; elsewhere peaks are sampled."""

    _STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    # Documented in proc_pid_clear_refs(5): sets the peak resident set size to the current one.
    _RESET_PEAK = "5"

    def __init__(self) -> None:
        self._process = psutil.Process(os.getpid())
        self.is_exact = self._reset()

    def read(self) -> Counter:
        """Also sets the peak back."""
        if not self.is_exact:
            current = self._process.memory_info().rss
            return Counter(current, current)
        kilobytes = {}
        for line in self._STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name in ("VmHWM", "VmRSS"):
                kilobytes[name] = int(value.split()[0])
        self._reset()
        current = kilobytes["VmRSS"] * 1024
        return Counter(current, max(current, kilobytes["VmHWM"] * 1024))

    def current(self) -> int:
        return self._process.memory_info().rss

    def _reset(self) -> bool:
        try:
            self._RESET.write_text(self._RESET_PEAK)
            return self._STATUS.exists()
        except OSError:
            return False


@lru_cache
def gpus() -> tuple[torch.device, ...]:
    """Those that ComfyUI computes on; none in its CPU mode."""
    find = getattr(management, "get_all_torch_devices", None)  # newer ComfyUI uses several
    devices = find() if find is not None else [management.get_torch_device()]
    return tuple(device for device in devices if device.type in ("cuda", "xpu", "mps"))


def main_device() -> str:
    """The one that the peaks of nodes are told of."""
    found = gpus()
    return str(found[0]) if found else CPU


class Allocator(NamedTuple):
    """Of torch on a GPU, in bytes. peak: the most allocated since it was set back. retries, ooms: as in
    DeviceReading."""

    allocated: int
    reserved: int
    peak: int
    retries: int = 0
    ooms: int = 0


def allocator(device: torch.device) -> Allocator:
    if device.type == "mps":
        allocated = torch.mps.current_allocated_memory()
        return Allocator(allocated, max(allocated, torch.mps.driver_allocated_memory()), allocated)
    stats: Any = (torch.cuda if device.type == "cuda" else torch.xpu).memory_stats(device)
    return Allocator(
        stats.get("allocated_bytes.all.current", 0),
        stats.get("reserved_bytes.all.current", 0),
        stats.get("allocated_bytes.all.peak", 0),
        stats.get("num_alloc_retries", 0),
        stats.get("num_ooms", 0),
    )


def pages(device: torch.device, reserved: int) -> int:
    """Bytes of dynamic VRAM on the device beside torch's `reserved` ones; 0 where ComfyUI has none.

    Its library counts all devices together: with several of them, nothing is known of one.
    """
    try:
        from comfy.memory_management import aimdo_enabled  # switched while ComfyUI starts
        from comfy_aimdo import control
    except ImportError:
        return 0
    if not aimdo_enabled or len(gpus()) != 1:
        return 0
    return dynamic_pages(int(control.get_total_vram_usage()), reserved)


class Counters:
    """Those of the RAM and of every GPU."""

    def __init__(self) -> None:
        self._resident = ResidentMemory()

    def read(self) -> dict[str, Counter]:
        """By device, with the peak since this was called before."""
        found = {CPU: self._resident.read()}
        for device in gpus():
            torchs = allocator(device)
            beside = pages(device, torchs.reserved)
            found[str(device)] = Counter(
                torchs.allocated + beside, torchs.peak + beside, torchs.retries, torchs.ooms
            )
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            elif device.type == "xpu":
                torch.xpu.reset_peak_memory_stats(device)
        return found

    def resident(self) -> int:
        return self._resident.current()
