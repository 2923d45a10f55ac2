"""Pages of mapped files, read by several threads before they are used.

Whoever touches a mapped page that is not in memory waits for the disk, which then reads a little further: one thread
gets a fraction of what the disk can do. On Linux since 5.14 the system maps a whole range on request; elsewhere nothing
is read ahead.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch

THREADS = 4
# Bytes that a thread asks for at a time.
PIECE = 16 << 20
# Pages of a piece that are looked at.
SAMPLE = 8
# madvise: "populate (prefault) page tables readable"; Python does not name it.
_MADV_POPULATE_READ = 22


class ReadAhead:
    """Reads the pages of CPU tensors in the background, in this order; other tensors are left out, and so is what would
    be read at once anyway.

    limit: bytes to read at most. Whoever uses a tensor need not wait: what is not there yet is read on the way.
    As a context it stops at the end.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], limit: int | None = None) -> None:
        pieces = list(_pieces(tensors, limit))
        useful = _system() is not None and sum(piece.numel() for piece in pieces) > PIECE
        self._pieces = iter(pieces)
        self._lock = threading.Lock()
        self._stopped = False
        # Daemons: a program that ends does not wait until a model is read.
        self._threads = [
            threading.Thread(target=self._read, daemon=True, name="snug-read")
            for _ in range(THREADS if useful else 0)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Begins no other piece; those begun are read to their end."""
        self._stopped = True

    def wait(self) -> None:
        """Until all has been read."""
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        while not self._stopped:
            with self._lock:
                piece = next(self._pieces, None)
            if piece is None:
                return
            address = piece.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            nbytes = piece.data_ptr() + piece.numel() - address
            if not _is_cached(address, nbytes):
                _system().madvise(address, nbytes, _MADV_POPULATE_READ)


def _is_cached(address: int, nbytes: int) -> bool:
    """Whether some pages, taken as a sample of all, are in the cache: then they cost next to nothing."""
    system, flag = _system(), ctypes.create_string_buffer(1)
    step = max(1, nbytes // SAMPLE // mmap.PAGESIZE) * mmap.PAGESIZE
    return all(
        system.mincore(page, mmap.PAGESIZE, flag) == 0 and flag.raw[0] & 1
        for page in range(address, address + nbytes, step)
    )


def _pieces(tensors: Iterable[torch.Tensor], limit: int | None) -> Iterator[torch.Tensor]:
    """uint8 views of at most PIECE bytes: they keep the memory from being unmapped meanwhile."""
    left = sys.maxsize if limit is None else limit
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            continue
        for piece in tensor.detach().reshape(-1).view(torch.uint8).split(PIECE):
            left -= piece.numel()
            if left < 0:
                return
            yield piece


@lru_cache
def _system() -> Any:
    """The system's functions madvise and mincore, None where it cannot read ahead."""
    if sys.platform != "linux":
        return None
    system = ctypes.CDLL(None, use_errno=True)
    system.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    system.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    page = torch.zeros(2 * mmap.PAGESIZE, dtype=torch.uint8)
    address = -(-page.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    known = system.madvise(address, mmap.PAGESIZE, _MADV_POPULATE_READ) == 0
    return system if known or ctypes.get_errno() != errno.EINVAL else None
