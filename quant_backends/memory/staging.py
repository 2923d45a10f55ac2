"""Weights of mapped files on their way to a GPU, through two pinned buffers in turn.

A copy from memory that is not pinned goes the same way inside the driver, but on one thread, with reading and sending
one after the other. Here torch's threads read a piece of the file into one buffer while the other is on the link.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .slab import HostBuffer

PIECE_BYTES = 64 << 20
# Below this a copy ends before a second piece could begin.
LEAST_BYTES = 1 << 20

_open: ContextVar[Staging | None] = ContextVar("snug_staging", default=None)


class Staging:
    """device: with its index. Its buffers are made when something is copied first, and freed by `close`.

    For one thread. Copies are ordered on the stream that is current when `copy` is called.
    """

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._piece_bytes = piece_bytes
        self._buffers: list[HostBuffer] = []
        self._left: list[Any] = []  # events: what a buffer held has arrived
        self._turn = 0

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """A copy of `source`, a contiguous tensor on the CPU, on the device; the caller may use it at once there."""
        if not self._buffers:
            with torch.inference_mode(False):  # else they could not be written to outside of it
                self._buffers = [HostBuffer(self._piece_bytes, self.device) for _ in range(2)]
            self._left = [self._module.Event() for _ in self._buffers]
        if not all(buffer.is_pinned for buffer in self._buffers):
            return source.to(self.device)
        target = torch.empty_like(source, device=self.device)
        pieces = zip(
            _bytes(source).split(self._piece_bytes), _bytes(target).split(self._piece_bytes), strict=True
        )
        for piece, arriving in pieces:
            held = self._buffers[self._turn].bytes.narrow(0, 0, piece.numel())
            self._left[self._turn].synchronize()
            held.copy_(piece)
            self._send(held, arriving, self._left[self._turn])
            self._turn = 1 - self._turn
        return target

    def close(self) -> None:
        """Waits for what is under way and frees the buffers."""
        for event, buffer in zip(self._left, self._buffers, strict=True):
            event.synchronize()
            buffer.close()
        self._buffers, self._left = [], []

    def _send(self, held: torch.Tensor, arriving: torch.Tensor, event: Any) -> None:
        arriving.copy_(held, non_blocking=True)
        event.record(self._module.current_stream(self.device))


@contextmanager
def staged_copies(device: torch.device | None) -> Iterator[None]:
    """While it is open, `staged` copies to `device` through buffers; nothing changes for devices other than CUDA's."""
    if device is None or device.type != "cuda":
        yield
        return
    staging = Staging(device)
    token = _open.set(staging)
    try:
        yield
    finally:
        _open.reset(token)
        staging.close()


def staged(source: torch.Tensor, device: torch.device) -> torch.Tensor:
    """source.to(device), through pinned buffers where `staged_copies` is open for it and that is faster."""
    staging = _open.get()
    if staging is not None and staging.device == device and _worth_it(source):
        return staging.copy(source)
    return source.to(device)


def _worth_it(source: torch.Tensor) -> bool:
    on_host = source.device.type == "cpu" and source.is_contiguous()
    return on_host and source.nbytes >= LEAST_BYTES and not source.is_pinned()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
