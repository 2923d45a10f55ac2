"""Damaged files by the thousand: the reader says so or reads them, quickly and in little memory.

Every file is a small valid one with deterministic damage. Its metadata is decoded and its tensors are read,
both directly and as a diffusion model. Besides success only FileFormatError may come out, within a second of
processor time and 64 MiB of memory each.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from damage import DAMAGES, Damage, check_damaged_files
from snug.quant_backends.readers import GGUFFile, load_diffusion_gguf


def array(element: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", element, count) + payload


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.fixture
def valid(raw: Any) -> tuple[bytes, int]:
    """A valid file with a value of every type and tensors of several formats, and the size of its header."""
    words = array(8, 3, text("one") + text("two") + text("drei"))
    file = raw(data=bytes(range(256)) * 16).text("general.architecture", "flux")
    file.pair("general.alignment", 4, struct.pack("<I", 32))
    for value_type, code in enumerate("BbHhIif?"):
        file.pair(f"scalar.{value_type}", value_type, struct.pack("<" + code, 1))
        file.pair(f"array.{value_type}", 9, array(value_type, 3, struct.pack(f"<3{code}", 1, 2, 3)))
    for value_type, code in ((10, "Q"), (11, "q"), (12, "d")):
        file.pair(f"scalar.{value_type}", value_type, struct.pack("<" + code, 1))
    file.pair("words", 9, words).pair("nested", 9, array(9, 2, words + array(0, 2, b"\x01\x02")))
    file.pair("comfy.gguf.orig_shape.a.weight", 9, array(5, 4, struct.pack("<4i", 2, 8, 4, 4)))
    file.tensor("a.weight", (128, 2), 8, 0).tensor("b.weight", (256, 2), 12, 288)
    file.tensor("b.bias", (2,), 30, 576).tensor("scale", (64,), 2, 608).tensor(
        "c.weight", (2, 2, 1, 3, 4), 1, 672
    )
    content = file.build()
    return content, len(content) - len(file.data)


def use(path: Path) -> None:
    file = GGUFFile(path)
    for key in file.metadata:
        file.metadata[key]
    for name in file.tensors:
        assert file.read(name).sum() >= 0
    load_diffusion_gguf(path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage: Damage, valid: tuple[bytes, int], tmp_path: Path) -> None:
    check_damaged_files(damage, valid, tmp_path, ".gguf", use)


def test_the_undamaged_file_is_valid(valid: tuple[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "valid.gguf"
    path.write_bytes(valid[0])
    use(path)
    assert len(GGUFFile(path).tensors) == 5
