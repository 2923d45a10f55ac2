"""The base class of every tensor format, and the registry that subclassing fills.

A format cuts the last dimension of a tensor into blocks of `block_size` weights, each stored in
`block_bytes` bytes. A subclass documents the bit layout in its docstring and implements `decode`; where the
format can also be written, `encode`. Everything else (checks, chunks, output dtypes) is common to all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from ..core.errors import SnugError
from ..core.host_memory import empty

FORMATS: dict[str, type[Format]] = {}


class Scratch:
    """Temporary buffers of one dequantize call, reused by all its chunks; nothing outlives the call.

    All come out of one slab, which costs fewer page faults than many buffers. `nbytes` should cover the first
    chunk, the largest one.
    """

    def __init__(self, device: torch.device, nbytes: int = 0) -> None:
        self._slab = empty((nbytes,), torch.uint8, device)
        self._used = 0
        self._places: dict[str, torch.Tensor] = {}
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def get(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; the same `key` returns the same memory again."""
        buffer = self._buffers.get((key, shape))
        if buffer is None:
            nbytes = math.prod(shape) * dtype.itemsize
            place = self._places.get(key)
            if place is None or place.numel() < nbytes:
                place = self._places[key] = self._reserve(nbytes)
            buffer = place[:nbytes].view(dtype).view(shape)
            self._buffers[key, shape] = buffer
        return buffer

    def _reserve(self, nbytes: int) -> torch.Tensor:
        start = self._used
        self._used += -(-nbytes // 64) * 64  # aligned for every dtype and to cache lines
        if self._used > self._slab.numel():
            return torch.empty(nbytes, dtype=torch.uint8, device=self._slab.device)
        return self._slab[start : start + nbytes]


class Format:
    """One ggml tensor type. Subclasses are never instantiated: they are the value that names a format.

    name: ggml's name, e.g. "Q4_K" (the class name).
    ggml_type: ggml's type number in a GGUF file.
    block_size: weights per block; block_bytes: bytes per block.
    dtype: the torch dtype of a plain type such as F16, else None.
    can_quantize: whether `quantize_blocks` is defined.
    searches: whether it tries many scales or codes, for which it needs several times the memory.
    """

    name: ClassVar[str]
    ggml_type: ClassVar[int]
    block_size: ClassVar[int]
    block_bytes: ClassVar[int]
    dtype: ClassVar[torch.dtype | None] = None
    can_quantize: ClassVar[bool] = False
    searches: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__
        cls.can_quantize = "encode" in cls.__dict__
        if hasattr(cls, "ggml_type"):  # a base shared by several formats has none
            FORMATS[cls.name] = cls

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        """Decode blocks (uint8 [n, block_bytes]) into `out` (float32 [n, block_size]); both contiguous."""
        raise NotImplementedError

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Encode values (float32 [n, block_size]) into blocks (uint8 [n, block_bytes]).

        importance: weight of each value's squared error, float32 [n, block_size] from 0 to 1, or None.
        """
        raise SnugError(f"Snug cannot write {cls.name}; choose one of {', '.join(quantizable_formats())}.")

    @classmethod
    def dequantize_blocks(cls, blocks: torch.Tensor) -> torch.Tensor:
        """Decode blocks (uint8 [n, block_bytes]) to float32 [n, block_size] on the same device."""
        out = torch.empty((blocks.shape[0], cls.block_size), dtype=torch.float32, device=blocks.device)
        if blocks.storage_offset() % 8:
            blocks = blocks.clone()  # torch refuses views of wider dtypes at such an offset
        if out.numel():
            cls.decode(blocks.contiguous(), out, Scratch(blocks.device))
        return out

    @classmethod
    def quantize_blocks(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Encode float32 [n, block_size] to uint8 [n, block_bytes]; SnugError unless `can_quantize`.

        importance: as in `encode`.
        """
        return cls.encode(values, importance)

    @classmethod
    def nbytes(cls, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape; SnugError when its last dimension is no whole number of blocks."""
        last = shape[-1] if len(shape) else 1
        if last % cls.block_size:
            raise SnugError(
                f"A {cls.name} tensor of shape {tuple(shape)} is impossible: its last dimension {last} is "
                f"not a multiple of the block size {cls.block_size}; pick another format for this tensor."
            )
        return math.prod(shape) // cls.block_size * cls.block_bytes

    @classmethod
    def check_nbytes(cls, found: int, shape: Sequence[int]) -> None:
        """Raise SnugError unless `found` bytes hold exactly the weights of a tensor of this shape.

        Blocks may cross rows: writers store some tensors (convolutions of SD1.5) under another shape.
        """
        weights = math.prod(shape)
        blocks, rest = divmod(weights, cls.block_size)
        if rest or found != blocks * cls.block_bytes:
            raise SnugError(
                f"A {cls.name} tensor of shape {tuple(shape)} takes {blocks * cls.block_bytes} bytes in whole "
                f"blocks of {cls.block_size} weights, got {found} bytes for {weights} weights; the data is cut "
                f"off or its type or shape is wrong."
            )


def quantizable_formats() -> list[str]:
    """Names of the formats that Snug can write, in the order of their definition."""
    return [name for name, fmt in FORMATS.items() if fmt.can_quantize]
