"""Pages of real files, counted by the kernel."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from snug.quant_backends.memory import read_ahead
from snug.quant_backends.memory.read_ahead import PIECE, ReadAhead
from snug.quant_backends.readers.mapped_file import map_file, mapped_bytes

MIB = 1 << 20
SIZE = 48 * MIB
supported = pytest.mark.skipif(
    read_ahead._system() is None, reason="this system does not read ahead on request"
)


def _mapped_in_memory() -> int:
    """Bytes of files that are mapped and resident in this process."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")
    )
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("read_ahead") / "weights"
    path.write_bytes(os.urandom(MIB) * (SIZE // MIB))
    return path


def _drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = mapped_bytes(map_file(path), 0, SIZE)
    if read_ahead._is_cached(mapped.data_ptr(), SIZE):
        pytest.skip("temporary files are kept in memory here")


def _grown(action: Callable[[], object]) -> float:
    """MiB by which it grows."""
    before = _mapped_in_memory()
    action()
    return (_mapped_in_memory() - before) / MIB


@supported
def test_pages_are_in_memory_before_anything_touches_them(file: Path) -> None:
    _drop_from_cache(file)
    tensor = mapped_bytes(map_file(file), 100, SIZE - 100)
    assert _grown(lambda: ReadAhead([tensor]).wait()) > 46
    assert _grown(lambda: tensor.sum()) < 2
    assert tensor[-MIB:].numpy().tobytes() == file.read_bytes()[:MIB]


@supported
def test_no_more_than_the_limit_and_in_order(file: Path) -> None:
    _drop_from_cache(file)
    tensor = mapped_bytes(map_file(file), 0, SIZE)
    assert 31 < _grown(lambda: ReadAhead([tensor], limit=2 * PIECE).wait()) < 34
    assert _grown(lambda: tensor[: 2 * PIECE].sum()) < 1
    assert _grown(lambda: tensor[2 * PIECE :].sum()) > 14


@supported
def test_little_and_what_is_cached_is_left_to_those_who_use_it(file: Path) -> None:
    _drop_from_cache(file)
    small = mapped_bytes(map_file(file), 0, PIECE)
    assert _grown(lambda: ReadAhead([small]).wait()) < 1
    file.read_bytes()
    assert _grown(lambda: ReadAhead([mapped_bytes(map_file(file), 0, SIZE)]).wait()) < 1


@supported
def test_it_stops(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = [], threading.Event()

    def madvise(*arguments: int) -> int:
        asked.append(arguments)
        go_on.wait()
        return 0

    system = SimpleNamespace(madvise=madvise, mincore=lambda *_: -1)
    monkeypatch.setattr(read_ahead, "_system", lambda: system)
    monkeypatch.setattr(read_ahead, "PIECE", MIB)
    with ReadAhead([mapped_bytes(map_file(file), 0, SIZE)]) as reading:
        pass
    go_on.set()
    reading.wait()
    assert len(asked) <= read_ahead.THREADS


@supported
def test_what_was_written_to_stays(file: Path) -> None:
    tensor = mapped_bytes(map_file(file), 0, SIZE)
    tensor[5] = 7
    tensor[6] = 9
    ReadAhead([tensor]).wait()
    assert tensor[5:7].tolist() == [7, 9]


def test_tensors_of_any_kind_and_systems_without_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [
        torch.empty(0),
        torch.ones(()),
        torch.ones(3, 4).t(),
        torch.ones(3, device="meta"),
        torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
    ]
    ReadAhead(tensors).wait()
    monkeypatch.setattr(read_ahead, "_system", lambda: None)
    ReadAhead([mapped_bytes(map_file(file), 0, SIZE)]).wait()
