"""Deterministic damage to files, and what a reader may do about it: refuse or read, quickly and in little memory."""

from __future__ import annotations

import itertools
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MAX_SECONDS = 1.0
MAX_BYTES = 64 << 20
Damage = Callable[[random.Random, bytes, int], Iterator[bytes]]

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


DAMAGES: list[Damage] = [bit_flips, byte_runs, truncations, absurd_numbers, splices]


def check_damaged_files(
    damage: Damage, valid: tuple[bytes, int], folder: Path, ending: str, use: Callable[[Path], None]
) -> None:
    """`use` reads a file; valid: content and the size of the part to damage. Only FileFormatError may come out."""
    outcomes = {True: 0, False: 0}
    for index, content in enumerate(damage(random.Random(damage.__name__), *valid)):
        path = folder / f"{index}{ending}"  # never the same file twice: an older mapping must not change
        path.write_bytes(content)
        outcomes[is_readable(path, use, f"{damage.__name__} {index}")] += 1
        path.unlink()
    assert sum(outcomes.values()) >= 1000
    assert all(outcomes.values()), "the damage should neither always matter nor never"


def is_readable(path: Path, use: Callable[[Path], None], label: str) -> bool:
    """Whether `use` reads what lies there; fails the test unless it does so or refuses it, quickly and in bounds."""
    # Imported here because the pack is registered after the helpers may be imported.
    from snug.quant_backends.core.errors import FileFormatError

    reset_peak()
    started, before, readable = time.process_time(), peak_bytes(), True
    try:
        use(path)
    except FileFormatError:
        readable = False
    except Exception as error:
        pytest.fail(f"{label}: {type(error).__name__}: {error}")
    assert time.process_time() - started < MAX_SECONDS, label
    assert peak_bytes() - before < MAX_BYTES, label
    return readable
