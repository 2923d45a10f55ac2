"""What a device's hardware can do. The only module of the core that asks."""

from __future__ import annotations

from functools import lru_cache

import torch

# Compute capabilities from which NVIDIA's matrix units multiply these (Turing, Ada).
_INT8, _FLOAT8 = (7, 5), (8, 9)


def multiplies_int8(device: torch.device) -> bool:
    """Whether torch._int_mm runs there, in hardware made for it or at least in integers."""
    return device.type == "cpu" or _capability(device) >= _INT8


def multiplies_float8(device: torch.device) -> bool:
    """Whether torch._scaled_mm runs there faster than a float matmul; on CPUs it exists and does not."""
    return _capability(device) >= _FLOAT8


def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return _capability_of(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
