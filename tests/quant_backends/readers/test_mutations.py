"""Damaged files by the thousand: the reader says so or reads them, quickly and in little memory.

Every file is a small valid one with deterministic damage. Its metadata is decoded and its tensors are read,
both directly and as a diffusion model. Besides success only FileFormatError may come out, within a second of
processor time and 64 MiB of memory each.
"""

from __future__ import annotations

import itertools
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.readers import GGUFFile, load_diffusion_gguf

MAX_SECONDS = 1.0
MAX_BYTES = 64 << 20

ABSURD = [
    0,
    1,
    7,
    255,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 32,
    (1 << 64) - 1,
]


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


def bit_flips(dice: random.Random, content: bytes, header: int) -> Iterator[bytes]:
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(dice.choice((1, 1, 2, 4, 16))):
            damaged[dice.randrange(header)] ^= 1 << dice.randrange(8)
        yield bytes(damaged)


def byte_runs(dice: random.Random, content: bytes, header: int) -> Iterator[bytes]:
    for _ in range(1000):
        start, size = dice.randrange(header), dice.choice((1, 2, 4, 8, 24, 100))
        run = dice.choice((bytes(size), b"\xff" * size, dice.randbytes(size)))
        yield content[:start] + run + content[start + size :]


def truncations(dice: random.Random, content: bytes, header: int) -> Iterator[bytes]:
    for size in itertools.chain(range(1, header), range(header, len(content), 61)):
        yield content[:size]


def absurd_numbers(dice: random.Random, content: bytes, header: int) -> Iterator[bytes]:
    """Every byte of the header takes its turn, hence every count, length, dimension, type and offset does."""
    for position in range(4, header - 8):
        for value in dice.sample(ABSURD, 3):
            yield content[:position] + struct.pack("<Q", value) + content[position + 8 :]
        yield (
            content[:position] + struct.pack("<I", dice.choice(ABSURD) & 0xFFFFFFFF) + content[position + 4 :]
        )


def splices(dice: random.Random, content: bytes, header: int) -> Iterator[bytes]:
    for _ in range(1000):
        start, source, size = dice.randrange(header), dice.randrange(header), dice.randrange(1, 200)
        removed = dice.choice((0, size, dice.randrange(200)))
        yield content[:start] + content[source : source + size] + content[start + removed :]


def peak_bytes() -> int:
    """Peak resident memory since the last reset; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def reset_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def use(path: Path) -> None:
    file = GGUFFile(path)
    for key in file.metadata:
        file.metadata[key]
    for name in file.tensors:
        assert file.read(name).sum() >= 0
    load_diffusion_gguf(path)


@pytest.mark.parametrize("damage", [bit_flips, byte_runs, truncations, absurd_numbers, splices])
def test_damaged_files(
    damage: Callable[[random.Random, bytes, int], Iterator[bytes]], valid: tuple[bytes, int], tmp_path: Path
) -> None:
    outcomes = {"read": 0, "refused": 0}
    for index, content in enumerate(damage(random.Random(damage.__name__), *valid)):
        path = tmp_path / f"{index}.gguf"  # never the same file twice: an older mapping must not change
        path.write_bytes(content)
        reset_peak()
        started, before = time.process_time(), peak_bytes()
        try:
            use(path)
            outcomes["read"] += 1
        except FileFormatError:
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"{damage.__name__} {index}: {type(error).__name__}: {error}")
        assert time.process_time() - started < MAX_SECONDS, f"{damage.__name__} {index}"
        assert peak_bytes() - before < MAX_BYTES, f"{damage.__name__} {index}"
        path.unlink()
    assert sum(outcomes.values()) >= 1000
    assert outcomes["refused"] and outcomes["read"], "the damage should neither always matter nor never"


def test_the_undamaged_file_is_valid(valid: tuple[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "valid.gguf"
    path.write_bytes(valid[0])
    use(path)
    assert len(GGUFFile(path).tensors) == 5
