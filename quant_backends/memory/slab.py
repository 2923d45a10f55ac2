"""The host's side of streaming: pinned memory, and where each tensor of a plan lies in the bytes of its group.

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

# The tensors of a block, by its number.
Source = Callable[[int], Sequence[torch.Tensor]]

# CUDA's flag for memory that every context sees as pinned.
PORTABLE = 1

_open_buffers: weakref.WeakSet[HostBuffer] = weakref.WeakSet()


def host_bytes_in_use(pinned_only: bool = False) -> int:
    """Of all buffers that are not closed."""
    return sum(buffer.bytes.numel() for buffer in _open_buffers if buffer.is_pinned or not pinned_only)


class HostBuffer:
    """bytes: uint8 [nbytes] in the host's memory, uninitialised, or memory that is there already.

    pin_for: the device whose copies it is pinned for; None leaves it pageable. Where pinning fails (other programs
    may hold most of what the system allows) a warning is logged and `is_pinned` is False: copies are slower then.
    """

    def __init__(
        self, nbytes: int, pin_for: torch.device | None = None, existing: torch.Tensor | None = None
    ) -> None:
        new = existing is None
        self.bytes = host_memory.empty((nbytes,), torch.uint8, torch.device("cpu")) if new else existing
        self._unpin: weakref.finalize[..., HostBuffer] | None = None
        if pin_for is not None:
            self.pin(pin_for)
        _open_buffers.add(self)

    @property
    def is_pinned(self) -> bool:
        return self._unpin is not None and self._unpin.alive

    def close(self) -> None:
        """Unpins and lets go of the memory. No copy may be under way."""
        _open_buffers.discard(self)
        if self._unpin is not None:
            self._unpin()
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def pin(self, device: torch.device) -> None:
        """Takes all of the memory at once, where it was not used before."""
        module = torch.get_device_module(device)
        if not hasattr(module, "cudart") or not self.bytes.numel():
            return
        runtime, address, nbytes = module.cudart(), self.bytes.data_ptr(), self.bytes.numel()
        if int(runtime.cudaHostRegister(address, nbytes, PORTABLE)) == 0:
            self._unpin = weakref.finalize(self, runtime.cudaHostUnregister, address)
            self._unpin.atexit = False  # the driver does it then
            return
        logger.warning("Cannot pin %d MB of memory; offloaded weights are copied slower.", nbytes >> 20)
        with contextlib.suppress(RuntimeError):  # the error would otherwise come out of the next operation
            torch.zeros(1, device=device).add_(1)
            module.synchronize(device)


class GroupLayout:
    """Which tensors the bytes of each group are.

    source: is asked for every streamed block at once, and again whenever a group is filled. Raises SnugError when a
    block's tensors are not those that the plan was made for.
    """

    def __init__(self, plan: OffloadPlan, source: Source) -> None:
        self._plan = plan
        self._source = source
        self._kinds: dict[int, list[tuple[torch.dtype, torch.Size]]] = {}
        self._starts: dict[int, int] = {}  # of each block, from the start of its group
        for group in plan.groups:
            start = 0
            for block in group.blocks:
                self._starts[block] = start
                start += plan.blocks[block].nbytes
                self._kinds[block] = self._check(block, source(block))

    def views(self, block: int, group_bytes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of a block, as views of memory that starts with its group's bytes, here or on the device."""
        start, spec = self._starts[block], self._plan.blocks[block]
        return tuple(
            group_bytes.narrow(0, start + offset, size).view(dtype).view(shape)
            for offset, size, (dtype, shape) in zip(spec.offsets, spec.sizes, self._kinds[block], strict=True)
        )

    @torch.no_grad()
    def fill(self, group: int, group_bytes: torch.Tensor) -> None:
        """Writes a group's bytes, tensor by tensor: of what is mapped from a file nothing is held twice."""
        for block in self._plan.groups[group].blocks:
            for view, tensor in zip(self.views(block, group_bytes), self._source(block), strict=True):
                view.copy_(tensor)

    def slab_of_before(self) -> torch.Tensor | None:
        """The slab of an earlier streaming, uint8, when the source's tensors are still views of it as planned."""
        slab: torch.Tensor | None = None
        for group in self._plan.groups:
            for block in group.blocks:
                start, tensors = group.offset + self._starts[block], self._source(block)
                for offset, tensor in zip(self._plan.blocks[block].offsets, tensors, strict=True):
                    if slab is None:
                        slab = _bytes_from(tensor, start + offset, self._plan.slab_bytes)
                    if slab is None or tensor.data_ptr() != slab.data_ptr() + start + offset:
                        return None
        return slab

    def _check(self, block: int, tensors: Sequence[torch.Tensor]) -> list[tuple[torch.dtype, torch.Size]]:
        spec, found = self._plan.blocks[block], tuple(tensor.nbytes for tensor in tensors)
        if found != spec.sizes:
            raise SnugError(
                f"Block {spec.name} has tensors of {found} bytes where the offload plan was made for {spec.sizes}; "
                f"the model's weights were changed after the plan: apply the offload node last."
            )
        return [(tensor.dtype, tensor.shape) for tensor in tensors]


def _bytes_from(tensor: torch.Tensor, before: int, nbytes: int) -> torch.Tensor | None:
    """uint8 [nbytes] of the memory that a tensor lies in, from `before` bytes ahead of it; None: it has not so much."""
    if tensor.device.type != "cpu":
        return None
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr() - before
    if start < 0 or start + nbytes > storage.nbytes():
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (nbytes,), (1,))
