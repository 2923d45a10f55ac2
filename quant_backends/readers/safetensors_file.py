"""Memory-mapped reader of safetensors files.

File layout (huggingface/safetensors, README), little-endian::

    uint64   length of the header
    header   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__" -> {text: text}
    data     each tensor at its offsets from here

Nothing found in the file is used before it is checked against the size of the file; whatever is wrong with a
file, the only exception that leaves this module is `FileFormatError`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..core.errors import FileFormatError
from .gguf_tensors import MAX_DIMS, MAX_TENSOR_NAME, is_possible
from .gguf_values import REDOWNLOAD, shown
from .mapped_file import FOREIGN_MAGICS, map_file, mapped_bytes

# The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
METADATA = "__metadata__"
PICKLE_HINT = "convert it to safetensors (loading it could run code that it contains)"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; `offset` counts bytes from the start of the file, `dtype_name` is safetensors'."""

    name: str
    dtype: torch.dtype
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """A safetensors file, opened and checked; tensors stay on disk until they are touched.

    Attributes: `path`, `metadata` (text to text), `tensors` (by name, in the order of the header). Tensors are
    views of a private mapping that lives as long as one of them does. Raises `FileFormatError` when the file is
    missing, unreadable, of another kind or inconsistent in any way.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._bytes = map_file(self.path)
        header, self._data_start = self._read_header()
        self.metadata: Mapping[str, str] = self._read_metadata(header.pop(METADATA, {}))
        self.tensors = {name: self._read_entry(name, entry) for name, entry in header.items()}
        self._refuse_overlaps()

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype and shape, a view of the file; KeyError for an unknown name.

        Whoever hands it out as a plain weight passes it through `mapped_file.writable`.
        """
        info = self.tensors[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)  # frombuffer refuses to make empty tensors
        stored = mapped_bytes(self._bytes, info.offset, info.nbytes)
        if info.offset % info.dtype.itemsize:
            stored = stored.clone()  # written by a tool that aligns nothing
        return stored.view(info.dtype).view(info.shape)

    def only(self, names: Collection[str], metadata: Mapping[str, str]) -> SafetensorsFile:
        """The same open file as if it had no other tensors, and this metadata."""
        part = copy.copy(self)
        part.tensors = {name: info for name, info in self.tensors.items() if name in names}
        part.metadata = metadata
        return part

    def fail(self, problem: str, hint: str = REDOWNLOAD) -> NoReturn:
        """Raise FileFormatError about this file."""
        raise FileFormatError(self.path, problem, hint)

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = len(self._bytes)
        head = bytes(self._bytes[:24])
        length = struct.unpack_from("<Q", head)[0] if size >= 8 else 0
        if length > size - 8 or head[8:9] != b"{":
            self._refuse_foreign(head)
        if length > min(size - 8, MAX_HEADER_BYTES):
            self.fail(
                f"the header has {length} bytes, expected at most {max(0, min(size - 8, MAX_HEADER_BYTES))}"
            )
        try:
            header = strict_json(self._bytes[8 : 8 + length])
        except ValueError as error:
            self.fail(f"the header is not valid JSON ({error})")
        if not isinstance(header, dict):
            self.fail("the header is not a JSON object")
        return header, 8 + length

    def _refuse_foreign(self, head: bytes) -> None:
        if head.startswith(b"GGUF"):
            self.fail("the file is a GGUF model, expected safetensors", "give it the ending .gguf")
        if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")):
            self.fail("the file is a PyTorch pickle, expected safetensors", PICKLE_HINT)
        for magic, what, hint in FOREIGN_MAGICS:
            if head.startswith(magic):
                self.fail(f"the file is {what}, expected safetensors", hint)

    def _read_metadata(self, found: Any) -> dict[str, str]:
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            self.fail("the metadata of the header is not a mapping of text to text")
        return found

    def _read_entry(self, name: str, entry: Any) -> StoredTensor:
        what = f"tensor {shown(name)}"
        if len(name) > MAX_TENSOR_NAME:
            self.fail(f"the name of {what} has {len(name)} characters, expected at most {MAX_TENSOR_NAME}")
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            self.fail(f"{what} lacks dtype, shape or data_offsets in the header")
        dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            self.fail(
                f"{what} has the unknown dtype {shown(str(dtype_name))}", "update torch and this node pack"
            )
        if not are_counts(shape) or len(shape) > MAX_DIMS or not is_possible(shape):
            self.fail(f"{what} has an impossible shape")
        if not are_counts(offsets) or len(offsets) != 2:
            self.fail(f"{what} has impossible offsets")
        begin, end = offsets
        dtype, nbytes = DTYPES[dtype_name], math.prod(shape) * DTYPES[dtype_name].itemsize
        if end - begin != nbytes:
            self.fail(f"{what} takes {nbytes} bytes, but its offsets span {end - begin}")
        if self._data_start + end > len(self._bytes):
            self.fail(f"{what} ends at byte {self._data_start + end} but the file ends at {len(self._bytes)}")
        return StoredTensor(name, dtype, dtype_name, tuple(shape), self._data_start + begin, nbytes)

    def _refuse_overlaps(self) -> None:
        previous = None
        for info in sorted(
            (info for info in self.tensors.values() if info.nbytes), key=lambda info: info.offset
        ):
            if previous is not None and info.offset < previous.offset + previous.nbytes:
                self.fail(f"the tensors {shown(previous.name)} and {shown(info.name)} overlap")
            previous = info


def are_counts(values: object) -> bool:
    """Whether `values` is a list of whole numbers from 0 up."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )


def strict_json(content: bytes | memoryview) -> Any:
    """Parse JSON of a size already checked; ValueError for anything a correct writer never writes."""
    try:
        text = str(content, "utf-8")
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
