"""Files mapped into memory, and what is often found under the name of a model file."""

from __future__ import annotations

import mmap
import os
import sys
import warnings
from pathlib import Path

import torch

from ..core.errors import FileFormatError
from .gguf_values import REDOWNLOAD

# What is often found under the name of a model file: first bytes, what it is, what to do.
FOREIGN_MAGICS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "download the file itself"),
    (b"<!DOCTYPE", "a web page", "download the file itself, not the page about it"),
    (b"<html", "a web page", "download the file itself, not the page about it"),
    (b"PK\x03\x04", "a zip or PyTorch file", "load it with a loader for PyTorch checkpoints"),
    (b"lmgg", "a GGML file from before GGUF", "download a GGUF version of the model"),
    (b"fmgg", "a GGMF file from before GGUF", "download a GGUF version of the model"),
    (b"tjgg", "a GGJT file from before GGUF", "download a GGUF version of the model"),
)

# Python names this flag only from 3.13 on; this is its value on x86 and ARM.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def maps_read_only() -> bool:
    """Whether files are mapped read-only rather than copy-on-write.

    Windows reserves memory for the whole of a copy-on-write mapping, as if every page were going to be written:
    a model would count twice against what the system may hand out, though its pages are never written.
    """
    return sys.platform == "win32"


def map_file(path: Path) -> memoryview:
    """Map a whole file, copy-on-write or read-only; FileFormatError when it is missing, unreadable or empty.

    The memoryview (rather than the mmap) is what tensors hold: it keeps the mapping from ever being closed
    under them. On Linux the mapping asks for no swap reservation, which the kernel would otherwise refuse for
    a file larger than the machine's memory although almost none of it is ever written to.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FileFormatError(path, "the file is empty", REDOWNLOAD)
            if maps_read_only():
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            if sys.platform == "linux":
                flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                return memoryview(mmap.mmap(file.fileno(), 0, flags=flags, prot=protection))
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileFormatError(
            path, f"the file cannot be opened ({reason})", "check the path and its permissions"
        ) from error


def mapped_bytes(mapped: memoryview, offset: int, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] of a mapped file from `offset`, a view; `nbytes` is at least 1.

    Of a read-only mapping it must never be written to, which would end the process: quantized weights never
    are; for others see `writable`.
    """
    if not mapped.readonly:
        return torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=offset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=offset)


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a mapped file that may be written to: ComfyUI merges LoRAs into plain weights where they lie."""
    return tensor.clone() if maps_read_only() else tensor
