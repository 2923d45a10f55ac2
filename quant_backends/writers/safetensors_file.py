"""Writes models as safetensors in one of the conventions for quantized weights, a tensor at a time.

The header stands before the data but is known only at the end, so that its place is kept free: the format allows blanks
behind it. Data starts at multiples of eight bytes: tensors of other sizes come last, those of wider types first, as the
safetensors library has them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, TypeAlias

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..kernels.dequantize import dequantize_packed
from .conventions import CONVENTIONS, convention_for
from .new_file import check_disk_space, new_file
from .stored import Stored

Progress: TypeAlias = Callable[[int, int], None]
Value: TypeAlias = "PackedTensor | torch.Tensor"

NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
ALIGNMENT = 8
# No convention stores more tensors for a weight, and no entry of the header is longer than its name and this.
MAX_TENSORS, MAX_ENTRY = 6, 160
# What a convention says about a weight in the metadata, at most.
MAX_DESCRIPTION = 640
CHUNK = 64 << 20  # bytes between two calls of `progress`


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Value],
    convention: str = "",
    *,
    metadata: Mapping[str, str] | None = None,
    prefix: str = "",
    dtype: torch.dtype = torch.bfloat16,
    expected_bytes: int | None = None,
    progress: Progress | None = None,
) -> str:
    """Write a model to the safetensors file `path`; returns the convention.

    tensors: by their names in the file; each is asked for once, in order, so that a mapping may make them then.
    convention: a key of `CONVENTIONS`; "" takes the one that holds all packed weights, which are then looked at before.
    metadata: further text for the header, such as where the model comes from. prefix: of the names of the network, for
    the mark of scaled FP8. dtype: what libraries are told that weights had before they were quantized.
    expected_bytes: of all data together, where the mapping makes them: for the check of free space and `progress`.
    progress: called with bytes written and expected; it may raise to stop.

    The file appears under its name only when complete; an older one stays until then and nothing is left behind on an
    error. Raises SnugError for a weight that the convention does not hold, and when the disk is too full.
    """
    target = Path(path)
    if convention not in ("", *CONVENTIONS):
        raise SnugError(f"There is no convention {convention!r}; choose one of {', '.join(CONVENTIONS)}.")
    chosen = CONVENTIONS[convention or convention_for(tensors)]
    if expected_bytes is None:
        expected_bytes = sum(tensors[name].nbytes for name in tensors)
    check_disk_space(target, expected_bytes)
    with new_file(target) as temporary, open(temporary, "wb") as file:
        writer = _Writer(file, _room_for_header(tensors, metadata or {}), expected_bytes, progress)
        stored: dict[str, Stored] = {}
        for name in tensors:
            value = tensors[name]
            if isinstance(value, PackedTensor):
                plain = _plain(value)
                value = value if plain is None else plain
            if isinstance(value, PackedTensor):
                if not chosen.holds(value.format):
                    raise SnugError(
                        f"{name} is in {value.format.name}, which {chosen.title} does not hold; it holds "
                        f"{chosen.formats}: save as GGUF or in another convention, or quantize to one format."
                    )
                value = _on_cpu(value)
                stored[name] = Stored(value, dtype)
                for part, tensor in chosen.store(name, value, dtype).items():
                    writer.add(part, tensor)
            else:
                writer.add(name, value)
        for name, tensor in chosen.extras(stored, prefix).items():
            writer.add(name, tensor)
        others = [name for name in tensors if name not in stored]
        writer.finish({**(metadata or {}), **chosen.metadata(stored, others)})
    return chosen.name


class _Writer:
    """Tensors to an open file: those whose size keeps the next one aligned at once, the others at the end."""

    def __init__(self, file: BinaryIO, room: int, expected: int, progress: Progress | None) -> None:
        self._file, self._room, self._expected, self._progress = file, room, expected, progress
        self._header: dict[str, dict[str, object]] = {}
        self._waiting: list[tuple[str, torch.Tensor]] = []
        self._done = 0
        file.seek(8 + room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._header or any(name == other for other, _ in self._waiting):
            raise SnugError(
                f"Two tensors of the file would be called {name}; give the layers names of their own."
            )
        if tensor.dtype not in NAMES:
            raise SnugError(f"{name} is {tensor.dtype}, which safetensors files do not hold.")
        if tensor.nbytes % ALIGNMENT:
            self._waiting.append((name, tensor.detach().cpu()))
        else:
            self._write(name, tensor)

    def finish(self, metadata: Mapping[str, str]) -> None:
        for name, tensor in sorted(self._waiting, key=lambda item: -item[1].dtype.itemsize):
            self._write(name, tensor)
        header = {"__metadata__": dict(sorted(metadata.items())), **self._header}
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(content) > self._room:
            raise SnugError(
                f"The header of the file has {len(content)} bytes, more than the {self._room} that were kept for it; "
                f"this is a mistake in Snug, please report it."
            )
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + content.ljust(self._room))

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        offsets = [self._done, self._done + data.numel()]
        self._header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        for start in range(0, data.numel(), CHUNK):
            part = data[start : start + CHUNK]
            self._file.write(part.numpy().data)
            self._done += part.numel()
            if self._progress is not None:
                self._progress(self._done, max(self._expected, self._done))


def _room_for_header(tensors: Mapping[str, Value], metadata: Mapping[str, str]) -> int:
    """Bytes that no header for these is longer than, a multiple of eight."""
    names = sum(
        len(json.dumps(name)) * (MAX_TENSORS + 4) + MAX_TENSORS * MAX_ENTRY + MAX_DESCRIPTION
        for name in tensors
    )
    text = sum(len(json.dumps(item).encode()) + 2 for pair in metadata.items() for item in pair)
    return -(-(names + text + 1024) // ALIGNMENT) * ALIGNMENT


def _plain(value: PackedTensor) -> torch.Tensor | None:
    """A weight of a plain type, such as F16 in a GGUF file, as it is; None for others."""
    dtype = value.format.dtype if isinstance(value.format, type) else None
    return None if dtype is None else dequantize_packed(value, dtype)


def _on_cpu(value: PackedTensor) -> PackedTensor:
    parts = {name: part.cpu() for name, part in value.parts.items()}
    return PackedTensor(value.data.cpu(), value.format, value.shape, parts)
