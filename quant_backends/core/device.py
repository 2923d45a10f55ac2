"""What a device's hardware can do. The only module of the core that asks."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

# Compute capabilities from which NVIDIA's matrix units multiply these (Turing, Ada).
_INT8, _FLOAT8 = (7, 5), (8, 9)
# Major capability of the cards that have given up int8.
_NO_INT8 = 10


def multiplies_int8(device: torch.device) -> bool:
    """Whether torch._int_mm runs there, in hardware made for it or at least in integers."""
    return device.type == "cpu" or _capability(device) >= _INT8


def multiplies_float8(device: torch.device) -> bool:
    """Whether torch._scaled_mm runs there faster than a float matmul; on CPUs it exists and does not."""
    return _capability(device) >= _FLOAT8


def faster_product(device: torch.device) -> str | None:
    """The 8-bit numbers that a device multiplies faster than wider ones, by torch's name; None for neither.

    int8 where it has both, as with rotated channels it is the more exact; the data-centre cards of Blackwell have
    next to no units for it.
    """
    if device.type == "cpu":
        return "int8" if getattr(torch.cpu, "_is_vnni_supported", bool)() else None
    capability = _capability(device)
    if capability[0] == _NO_INT8:
        return "float8_e4m3fn"
    return "int8" if capability >= _INT8 else None


def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return _capability_of(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def multiprocessors(device: torch.device) -> int:
    """How many units the device runs programs on; 1 where there is no saying."""
    if device.type != "cuda":
        return 1
    return _multiprocessors_of(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Within it, kernels are started on `device`."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def records_graph() -> bool:
    """Whether work is being recorded into a CUDA graph at the moment, so that no result can be looked at."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def compute_capability(device: torch.device) -> tuple[int, int]:
    """NVIDIA's generation of a GPU, such as (8, 9); (0, 0) for everything else."""
    return _capability(device)


@lru_cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the Triton that is installed and works, else (0, 0)."""
    try:
        import triton
        import triton.language  # what a broken installation lacks

        major, minor = triton.__version__.split(".")[:2]
        return int(major), int(minor)
    except Exception:  # whatever a library for other hardware raises when it is imported
        return (0, 0)


def interprets_kernels() -> bool:
    """Whether Triton runs kernels on the CPU, for tests: it asks for this variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
