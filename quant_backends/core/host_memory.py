"""Fresh CPU memory in huge pages.

Where Linux gives huge pages only on request (`transparent_hugepage` set to "madvise", a common default), torch
does not ask for them: touching a fresh tensor page by page then takes several times as long as decoding
weights into it. numpy asks for its arrays; this does it for tensors.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

# Below this the C library mostly hands out memory that was in use before; numpy draws the same line.
HUGE_FROM_BYTES = 4 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Like `torch.empty`: an uninitialised contiguous tensor; large ones on the CPU lie in huge pages.

    Such a tensor's storage cannot be resized. Elsewhere than on Linux this is `torch.empty`.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_FROM_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones do
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
