"""Unpacking bit fields from many bytes at once: eight bytes per 64-bit word, one mask for all of them.

A shift moves bits across byte borders; the mask that follows removes the strangers, so a field must fit into
its byte after the shift. Word order within the block is kept, hence no byte order matters.
"""

from __future__ import annotations

import functools

import torch

from .base import Scratch


@functools.cache
def number(value: int | float) -> torch.Tensor:
    """A number as a zero-dimensional tensor: torch takes it as operand on any device as it is.

    Handing over a Python number costs torch about 4 microseconds per operation, often more than the work itself.
    """
    return torch.tensor(value, device="cpu")


@functools.cache
def splat(byte: int) -> torch.Tensor:
    """The 64-bit integer whose eight bytes all are `byte`, as `number` makes it."""
    return number(int.from_bytes(bytes([byte]) * 8, "little", signed=True))


def all_words(blocks: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """All bytes of the blocks, headers included, as int64 [ceil(bytes / 8)] (the last word may be padded)."""
    flat = blocks.view(-1)
    if flat.storage_offset() % 8 == 0 and flat.numel() % 8 == 0:
        return flat.view(torch.int64)
    padded = scratch.get("padded", (-(-flat.numel() // 8) * 8,), torch.uint8)
    padded[: flat.numel()].copy_(flat)
    return padded.view(torch.int64)


def column_words(blocks: torch.Tensor, start: int, stop: int, scratch: Scratch, key: str) -> torch.Tensor:
    """Bytes start..stop-1 of each block, copied together: int64 [n, (stop - start) / 8]."""
    columns = scratch.get(key, (blocks.shape[0], stop - start), torch.uint8)
    return columns.copy_(blocks[:, start:stop]).view(torch.int64)


def extract(words: torch.Tensor, shift: int, mask: int, out: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """out = (every word >> shift) & mask in each byte; a negative shift goes left. `out` may be strided."""
    if shift:
        operator = torch.bitwise_right_shift if shift > 0 else torch.bitwise_left_shift
        words = operator(words, number(abs(shift)), out=scratch.get("shifted", words.shape, torch.int64))
    return torch.bitwise_and(words, splat(mask), out=out)


def half_floats(columns: torch.Tensor) -> torch.Tensor:
    """float16 numbers stored in byte columns (uint8 [n, 2k]) as float32 [k, n], contiguous.

    The blocks come last because torch is several times faster along one long dimension.
    """
    halves = columns.view(torch.float16).t()
    return torch.empty(halves.shape, dtype=torch.float32, device=columns.device).copy_(halves)


def scale_codes(
    codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, minimum: torch.Tensor | None = None
) -> None:
    """out = codes * scale (- minimum), in float32 and in this order of rounding.

    codes: int8 or uint8, n * block_size values in the order of the weights; scale and minimum: float32, one
    value for each of equally long runs of weights.
    """
    out.copy_(codes.view(out.shape))
    runs = out.view(scale.numel(), -1)
    runs.mul_(scale.reshape(-1, 1))
    if minimum is not None:
        runs.sub_(minimum.reshape(-1, 1))
