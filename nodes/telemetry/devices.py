"""What each device's memory is taken by: torch where it knows, NVML and the operating system where it does not."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import psutil
import torch

from .accounting import DeviceParts, DeviceReading, ModelRow, split
from .counters import CPU, allocator, gpus, pages

logger = logging.getLogger("snug")


def read_devices(models: Iterable[ModelRow], resident: int) -> list[DeviceParts]:
    """The GPUs, the one that ComfyUI computes on first, then RAM. resident: bytes of RAM of this process."""
    models = list(models)
    return [*(_gpu(device, models) for device in gpus()), _ram(models, resident)]


def _ram(models: list[ModelRow], resident: int) -> DeviceParts:
    memory = psutil.virtual_memory()
    weights = sum(row.total if row.device == CPU else row.offloaded for row in models)
    return split(
        DeviceReading(
            CPU,
            "RAM",
            memory.total,
            memory.available,
            resident,
            resident,
            min(weights, resident),
            is_gpu=False,
        )
    )


def _gpu(device: torch.device, models: list[ModelRow]) -> DeviceParts:
    torchs = allocator(device)
    here = [row for row in models if row.device == str(device)]
    paged = sum(row.on_device for row in here if row.is_paged)
    weights = sum(row.on_device for row in here if not row.is_paged)
    total, free = _total_and_free(device, torchs.reserved)
    return split(
        DeviceReading(
            str(device),
            _title(device),
            total,
            free,
            torchs.allocated,
            torchs.reserved,
            weights,
            pages(device, torchs.reserved) or paged,
            retries=torchs.retries,
            ooms=torchs.ooms,
        )
    )


def _total_and_free(device: torch.device, reserved: int) -> tuple[int, int]:
    if device.type == "cuda":
        found = _nvml_memory(device)
        free, total = found if found is not None else torch.cuda.mem_get_info(device)
        return total, free
    if device.type == "xpu":
        total = torch.xpu.get_device_properties(device).total_memory
        return total, total - reserved  # other processes are not seen
    memory = psutil.virtual_memory()  # Apple's GPU shares the RAM
    return memory.total, memory.available


@lru_cache
def _title(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.xpu.get_device_name(device) if device.type == "xpu" else "Apple GPU"


def _nvml_memory(device: torch.device) -> tuple[int, int] | None:
    """(free, total), as the driver tells it without a call into this process's own context."""
    nvml, handle = _nvml(device)
    if nvml is None:
        return None
    try:
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
    except Exception as error:
        logger.debug("NVML does not tell the memory of %s: %s", device, error)
        return None
    return info.free, info.total


def driver_version() -> str | None:
    """Of NVIDIA's driver, where NVML is installed and there is such a device."""
    for device in gpus():
        nvml, _ = _nvml(device) if device.type == "cuda" else (None, None)
        try:
            found = nvml.nvmlSystemGetDriverVersion() if nvml is not None else None
        except Exception as error:  # its errors share no base with anything
            logger.debug("NVML does not tell its version: %s", error)
            continue
        if found is not None:
            return found.decode() if isinstance(found, bytes) else str(found)
    return None


@lru_cache
def _nvml(device: torch.device) -> tuple[Any, Any]:
    """(the library, its handle of the device), or Nones where it is not installed or does not know the device."""
    if torch.version.cuda is None:  # ROCm
        return None, None
    try:
        import pynvml

        pynvml.nvmlInit()
        # Devices are numbered in another order there, but have the same UUID.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception as error:
        logger.debug("NVML is not used: %s", error)
        return None, None
