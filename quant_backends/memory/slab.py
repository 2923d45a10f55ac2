"""The streamed tensors of a plan in one piece of host memory, in the order of execution, pinned where that is possible.

Pinned means registered with the driver after it was allocated: torch's own pinned allocator rounds sizes up to a
power of two (a slab of 9 GB would take 16) and keeps what is freed.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence

import torch

from ..core import host_memory
from ..core.errors import SnugError
from .plan import OffloadPlan

logger = logging.getLogger("snug")

# The tensors of a block, by its number. Streamed blocks are asked for once each, in the order of execution.
Source = Callable[[int], Sequence[torch.Tensor]]

# CUDA's flag for memory that every context sees as pinned.
PORTABLE = 1

_open_slabs: weakref.WeakSet[Slab] = weakref.WeakSet()


def slab_bytes_in_use(pinned_only: bool = False) -> int:
    """Of all slabs that are not closed."""
    return sum(slab.nbytes for slab in _open_slabs if slab.is_pinned or not pinned_only)


class Slab:
    """Host memory with the streamed tensors of `plan`, filled from `source` block by block.

    pin_for: the device whose copies the memory is pinned for; None leaves it pageable. Where pinning fails (other
    programs may hold most of what the system allows) a warning is logged and `is_pinned` is False: copies are
    slower then. Raises SnugError when a block's tensors are not those that the plan was made for.
    """

    def __init__(self, plan: OffloadPlan, source: Source, pin_for: torch.device | None = None) -> None:
        self.nbytes = plan.slab_bytes
        self._plan = plan
        self._kinds: dict[int, list[tuple[torch.dtype, torch.Size]]] = {}
        self._starts: dict[int, int] = {}  # of each block, from the start of its group
        self._buffer = host_memory.empty((self.nbytes,), torch.uint8, torch.device("cpu"))
        self._unpin: weakref.finalize[..., Slab] | None = None
        for number, group in enumerate(plan.groups):
            start = 0
            for block in group.blocks:
                self._starts[block] = start
                start += plan.blocks[block].nbytes
                self._fill(block, source(block), self.group(number))
        if pin_for is not None:
            self._pin(pin_for)
        _open_slabs.add(self)

    @property
    def is_pinned(self) -> bool:
        return self._unpin is not None and self._unpin.alive

    def group(self, number: int) -> torch.Tensor:
        """uint8 [group.nbytes], a view."""
        group = self._plan.groups[number]
        return self._buffer.narrow(0, group.offset, group.nbytes)

    def tensors(self, block: int, group_bytes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of a block as views of memory that starts with its group's bytes, here or on the device."""
        start = self._starts[block]
        spec = self._plan.blocks[block]
        return tuple(
            group_bytes.narrow(0, start + offset, size).view(dtype).view(shape)
            for offset, size, (dtype, shape) in zip(spec.offsets, spec.sizes, self._kinds[block], strict=True)
        )

    def close(self) -> None:
        """Unpins and lets go of the memory. No copy may be under way."""
        _open_slabs.discard(self)
        if self._unpin is not None:
            self._unpin()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _fill(self, block: int, tensors: Sequence[torch.Tensor], group_bytes: torch.Tensor) -> None:
        spec = self._plan.blocks[block]
        found = tuple(tensor.nbytes for tensor in tensors)
        if found != spec.sizes:
            raise SnugError(
                f"Block {spec.name} has tensors of {found} bytes where the offload plan was made for {spec.sizes}; "
                f"the model's weights were changed after the plan: apply the offload node last."
            )
        self._kinds[block] = [(tensor.dtype, tensor.shape) for tensor in tensors]
        for view, tensor in zip(self.tensors(block, group_bytes), tensors, strict=True):
            view.copy_(tensor)

    def _pin(self, device: torch.device) -> None:
        module = torch.get_device_module(device)
        if not hasattr(module, "cudart") or not self.nbytes:
            return
        runtime, address = module.cudart(), self._buffer.data_ptr()
        if int(runtime.cudaHostRegister(address, self.nbytes, PORTABLE)) == 0:
            self._unpin = weakref.finalize(self, runtime.cudaHostUnregister, address)
            self._unpin.atexit = False  # the driver does it then
            return
        logger.warning("Cannot pin %d MB of memory; offloaded weights are copied slower.", self.nbytes >> 20)
        with contextlib.suppress(RuntimeError):  # the error would otherwise come out of the next operation
            torch.zeros(1, device=device).add_(1)
            module.synchronize(device)
