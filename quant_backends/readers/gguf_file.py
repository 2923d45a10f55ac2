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

import os
import re
from pathlib import Path
from types import TracebackType
from typing import final

import torch

from ..core.errors import FileFormatError
from .gguf_tensors import MIN_TENSOR_BYTES, TensorInfo, read_tensor_infos
from .gguf_values import REDOWNLOAD, ByteCursor, Metadata
from .mapped_file import FOREIGN_MAGICS, map_file, mapped_bytes, writable

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# The specification asks for a multiple of 8; nothing larger than a huge page makes sense.
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 21
# The shortest pair: key length, one character of key, type, value.
MIN_PAIR_BYTES = 8 + 1 + 4 + 1

MERGE_SPLITS = "merge the parts into one file with 'llama-gguf-split --merge' and load that"
_SPLIT_NAME = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)


def looks_like_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one by its first bytes or, failing that, by its name; False when it cannot be opened."""
    if os.fspath(path).lower().endswith(".gguf"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@final
class GGUFFile:
    """A GGUF file, opened and checked; the tensors stay on disk until their bytes are touched.

    Attributes: `path`, `version` (2 or 3), `alignment` (bytes), `metadata` (lazy mapping), `tensors` (by
    name, in the order of the file).

    The mapping is private: writing to a plain tensor never reaches the file, and packed ones are not to be written
    (on Windows they cannot be). It lives as long as this object or any tensor read from it; leaving a `with`
    block only drops this object's own hold on it. As with any memory mapping, a file that another program shortens
    while it is in use ends the process (SIGBUS); replacing a file by renaming another over it is safe.

    Raises `FileFormatError` when the file is missing, unreadable, not GGUF, of another byte order or version,
    one part of a split model, or inconsistent in any way.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._bytes: memoryview | None = map_file(self.path)
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
        data = mapped_bytes(self._bytes, info.offset, info.nbytes)
        return data if info.format.dtype is None else writable(data)

    def close(self) -> None:
        """Drop this object's hold on the mapping; tensors and metadata already handed out stay valid."""
        self._bytes = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
