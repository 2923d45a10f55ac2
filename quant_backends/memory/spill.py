"""Weights in a file instead of the host's memory, for those that come from none.

The system drops pages of a mapped file whenever it needs memory, and reads them again when they are used.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.errors import SnugError
from .plan import aligned, size_text

# What Linux knows about this process's memory.
MAPS = Path("/proc/self/maps")
# Mapped under a name, but no file: what drivers map for a GPU, pinned memory, and memory that processes share.
_NO_FILES = ("/dev/", "/memfd:", "/SYSV")


class FileBacked:
    """Which tensors lie in a mapped file, at the moment when this is made; none where the system does not say."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for line in MAPS.read_text().splitlines() if MAPS.exists() else ():
            addresses, _, _, _, inode, *name = line.split(maxsplit=5)
            path = "".join(name)
            if inode != "0" and (path.startswith("/dev/shm/") or not path.startswith(_NO_FILES)):
                start, end = (int(address, 16) for address in addresses.split("-"))
                self._starts.append(start)
                self._ends.append(end)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type != "cpu":
            return False
        number = bisect_right(self._starts, tensor.data_ptr()) - 1
        return number >= 0 and tensor.data_ptr() < self._ends[number]


def spill(
    tensors: Sequence[torch.Tensor],
    folder: Path,
    purpose: str = "Offloading to disk",
    instead: str = "offload to the CPU's memory",
) -> list[torch.Tensor]:
    """The same tensors (of any dtypes and shapes, on any device) in a temporary file in `folder`, mapped into memory.

    The file is gone with the last of the tensors; where open files cannot be deleted (Windows) it stays until
    `folder` is emptied. Raises SnugError when the disk has no room for it; purpose, instead: what it says needs the
    room, and what else can be done.
    """
    sizes = [aligned(tensor.nbytes) for tensor in tensors]
    total = sum(sizes)
    if total == 0:
        return list(tensors)
    free = shutil.disk_usage(folder).free
    if free < total:
        raise _no_room(folder, total, free, purpose, instead)
    with tempfile.NamedTemporaryFile(prefix="snug-offload-", dir=folder, delete=False, buffering=0) as file:
        path = Path(file.name)
        try:
            for tensor, size in zip(tensors, sizes, strict=True):
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
                file.write(bytes(size - tensor.nbytes))
        except BaseException as error:
            file.close()
            path.unlink()
            if isinstance(error, OSError):
                left = shutil.disk_usage(folder).free
                raise _no_room(folder, total, left, purpose, instead) from error
            raise
    mapped = torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8)
    with contextlib.suppress(PermissionError):  # Windows, as long as it is mapped
        path.unlink()
    pieces = mapped.split(sizes)
    return [
        piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]


def _no_room(folder: Path, wanted: int, free: int, purpose: str, instead: str) -> SnugError:
    return SnugError(
        f"{purpose} needs {size_text(wanted)} in {folder}, which has {size_text(free)} left; free some space, or "
        f"{instead}."
    )
