"""Memory-mapped reader of GGUF files, versions 2 and 3.

File layout (ggml's docs/gguf.md), little-endian::

    4 bytes  "GGUF"
    uint32   version
    uint64   number of tensors
    uint64   number of metadata pairs
    pairs    see gguf_values
    tensors  string name, uint32 n_dims, uint64 dims[n_dims] (fastest first), uint32 ggml type, uint64 offset
    padding  up to a multiple of `general.alignment` (32 when absent)
    data     each tensor at its offset from here, itself a multiple of the alignment

Nothing found in the file is used before it is checked against the size of the file, and whatever is wrong
with a file, the only exception that leaves this module is `FileFormatError`.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import final

import torch

from ..core.errors import FileFormatError
from .gguf_tensors import MIN_TENSOR_BYTES, TensorInfo, read_tensor_infos
from .gguf_values import REDOWNLOAD, ByteCursor, Metadata

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# The specification asks for a multiple of 8; nothing larger than a huge page makes sense.
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 21
# The shortest pair: key length, one character of key, type, value.
MIN_PAIR_BYTES = 8 + 1 + 4 + 1

# What is often found under the name of a model file: first bytes, what it is, what to do.
FOREIGN_MAGICS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "download the file itself"),
    (b"<!DOCTYPE", "a web page", "download the file itself, not the page about it"),
    (b"<html", "a web page", "download the file itself, not the page about it"),
    (b"PK\x03\x04", "a zip or PyTorch file", "load it with a loader for PyTorch checkpoints"),
    (b"lmgg", "a GGML file from before GGUF", "download a GGUF version of the model"),
    (b"fmgg", "a GGMF file from before GGUF", "download a GGUF version of the model"),
    (b"tjgg", "a GGJT file from before GGUF", "download a GGUF version of the model"),
)

MERGE_SPLITS = "merge the parts into one file with 'llama-gguf-split --merge' and load that"
_SPLIT_NAME = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)

# Python names this flag only from 3.13 on; this is its value on x86 and ARM.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@final
class GGUFFile:
    """A GGUF file, opened and checked; the tensors stay on disk until their bytes are touched.

    Attributes: `path`, `version` (2 or 3), `alignment` (bytes), `metadata` (lazy mapping), `tensors` (by
    name, in the order of the file).

    The mapping is private and copy-on-write: writing to a tensor never reaches the file. It lives as long as
    this object or any tensor read from it; leaving a `with` block only drops this object's own hold on it. As
    with any memory mapping, a file that another program shortens while it is in use ends the process
    (SIGBUS); replacing a file by renaming another over it is safe.

    Raises `FileFormatError` when the file is missing, unreadable, not GGUF, of another byte order or version,
    one part of a split model, or inconsistent in any way.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._bytes: memoryview | None = _map_file(self.path)
        cursor = ByteCursor(self._bytes, self.path)
        self.version = _read_version(cursor)
        tensor_count = cursor.count("the tensor count", MIN_TENSOR_BYTES)
        pair_count = cursor.count("the metadata count", MIN_PAIR_BYTES)
        self.metadata = Metadata(cursor, pair_count)
        _refuse_split(self.path, self.metadata)
        self.alignment = _read_alignment(self.path, self.metadata)
        self.tensors: dict[str, TensorInfo] = read_tensor_infos(cursor, tensor_count, self.alignment)

    def read(self, name: str) -> torch.Tensor:
        """The stored bytes of a tensor: 1-D uint8, `tensors[name].nbytes` long, a view of the file.

        Raises KeyError for a name the file does not have, ValueError after the file was closed.
        """
        info = self.tensors[name]
        if self._bytes is None:
            raise ValueError(f"{self.path.name} is closed: read '{name}' before leaving the with block")
        if info.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)  # frombuffer refuses to make empty tensors
        return torch.frombuffer(self._bytes, dtype=torch.uint8, count=info.nbytes, offset=info.offset)

    def close(self) -> None:
        """Drop this object's hold on the mapping; tensors and metadata already handed out stay valid."""
        self._bytes = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map_file(path: Path) -> memoryview:
    """Map a whole file copy-on-write.

    The memoryview (rather than the mmap) is what tensors hold: it keeps the mapping from ever being closed
    under them. On Linux the mapping asks for no swap reservation, which the kernel would otherwise refuse for
    a file larger than the machine's memory although almost none of it is ever written to.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FileFormatError(path, "the file is empty", REDOWNLOAD)
            if sys.platform == "linux":
                flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                return memoryview(mmap.mmap(file.fileno(), 0, flags=flags, prot=protection))
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileFormatError(
            path, f"the file cannot be opened ({reason})", "check the path and its permissions"
        ) from error


def _read_version(cursor: ByteCursor) -> int:
    head = bytes(cursor.buffer[:24])
    if not head.startswith(MAGIC):
        for magic, what, hint in FOREIGN_MAGICS:
            if head.startswith(magic):
                cursor.fail(f"the file is {what}, expected a GGUF model", hint)
        cursor.fail(f"the file starts with {head[:4]!r}, expected {MAGIC!r}", "choose a GGUF model file")
    cursor.take(len(MAGIC), "the magic")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version != 0:
        cursor.fail(
            f"the file is big-endian GGUF version {version >> 24}, expected little-endian",
            "convert it with gguf-py's gguf_convert_endian.py or download the little-endian file",
        )
    if version not in SUPPORTED_VERSIONS:
        hint = "download a newer conversion of the model" if version < 2 else "update this node pack"
        cursor.fail(f"the file has GGUF version {version}, expected 2 or 3", hint)
    return version


def _refuse_split(path: Path, metadata: Metadata) -> None:
    named = _SPLIT_NAME.search(path.name)
    # The metadata decides where it speaks: a merged file may still carry the name of its first part.
    parts = metadata.integer("split.count", int(named[1]) if named else 1)
    if parts > 1:
        raise FileFormatError(
            path, f"the file is one of {parts} parts of a split model, expected a whole one", MERGE_SPLITS
        )


def _read_alignment(path: Path, metadata: Metadata) -> int:
    found = metadata.integer("general.alignment", DEFAULT_ALIGNMENT)
    if not MIN_ALIGNMENT <= found <= MAX_ALIGNMENT or found & (found - 1):
        expected = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
        raise FileFormatError(
            path, f"metadata 'general.alignment' is {found}, expected {expected}", REDOWNLOAD
        )
    return found
