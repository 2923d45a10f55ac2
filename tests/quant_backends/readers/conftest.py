"""Files to read: written by the gguf package, or put together byte by byte where no writer would make them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GGUF_STRING = 8


def packed_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


@dataclass
class RawGGUF:
    """A GGUF file as plain fields; whatever is not given is consistent with the rest."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    pair_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    data: bytes = bytes(256)

    def pair(self, key: str | bytes, value_type: int, payload: bytes) -> RawGGUF:
        self.pairs.append(packed_string(key) + struct.pack("<I", value_type) + payload)
        return self

    def text(self, key: str, value: str | bytes) -> RawGGUF:
        return self.pair(key, GGUF_STRING, packed_string(value))

    def tensor(
        self, name: str | bytes = "w", dims: Sequence[int] = (64,), ggml_type: int = 0, offset: int = 0
    ) -> RawGGUF:
        shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        self.tensors.append(packed_string(name) + shape + struct.pack("<IQ", ggml_type, offset))
        return self

    def build(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.pairs) if self.pair_count is None else self.pair_count,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join(self.pairs + self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data


@pytest.fixture
def raw() -> type[RawGGUF]:
    return RawGGUF


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write bytes or a RawGGUF to a file and return its path."""

    def write(content: bytes | RawGGUF, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content.build() if isinstance(content, RawGGUF) else content)
        return path

    return write


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a file with the gguf package.

    tensors: name to array, or to (array, type name) which quantizes it. metadata: key to (value type name,
    value) or (value type name, value, element type name). setup: called with the writer before anything is
    added.
    """
    gguf = pytest.importorskip("gguf")

    def write(
        tensors: Mapping[str, Any],
        metadata: Mapping[str, tuple[Any, ...]] | None = None,
        architecture: str = "flux",
        name: str = "model.gguf",
        setup: Callable[[Any], None] | None = None,
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture)
        if setup is not None:
            setup(writer)
        for key, (value_type, value, *element) in (metadata or {}).items():
            sub_type = gguf.GGUFValueType[element[0]] if element else None
            writer.add_key_value(key, value, gguf.GGUFValueType[value_type], sub_type)
        for key, tensor in tensors.items():
            if isinstance(tensor, tuple):
                quantization = gguf.GGMLQuantizationType[tensor[1]]
                writer.add_tensor(key, gguf.quantize(tensor[0], quantization), raw_dtype=quantization)
            else:
                writer.add_tensor(key, np.ascontiguousarray(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
