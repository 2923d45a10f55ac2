"""Memory after many cycles of load, sample, change settings and unload."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import memory_cycles
import pytest
from combinations import FEATURES, sample, with_features
from simulated_transfers import simulate_transfers
from snug.quant_backends.memory.slab import host_bytes_in_use

CYCLES = 200
needs_linux = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells what memory is a process's own"
)


@pytest.mark.parametrize("chain", [["offload"], ["casting"], list(FEATURES)], ids=" then ".join)
def test_a_model_that_nobody_needs_is_freed_at_once(
    chain: list[str], twins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector, which ComfyUI calls with a warning when such a model is still there."""
    simulate_transfers(monkeypatch)
    gc.collect()
    gc.disable()
    try:
        patcher = with_features(twins("sd3", "Q4_0").load()[0], chain)
        sample(patcher, "sd3", steps=1)
        network = weakref.ref(patcher.model)
        del patcher
        assert network() is None
        assert host_bytes_in_use() == 0
    finally:
        gc.enable()


def run(root: Path, comfyui: Path, twins: Any, *arguments: str) -> list[dict[str, int]]:
    pair = twins("sd3", "Q4_0")
    command = [sys.executable, memory_cycles.__file__, comfyui, pair.gguf, pair.dense, *arguments]
    folders = os.pathsep.join(str(root / name) for name in ("scripts", "tests/support"))
    result = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def growth(found: list[dict[str, int]]) -> float:
    """The largest rise of the process's own memory, after the first quarter in which everything is used once."""
    used = [entry["private"] for entry in found[len(found) // 4 :]]
    return max(later / least for later, least in zip(used, itertools.accumulate(used, min), strict=True))


@needs_linux
@pytest.mark.slow
def test_memory_is_flat(root: Path, comfyui_path: Path, twins: Any) -> None:
    found = run(root, comfyui_path, twins, str(CYCLES))
    assert len(found) == CYCLES // memory_cycles.EVERY
    assert growth(found) < 1.02, [entry["private"] >> 20 for entry in found]
    for name in ("host", "pinned", "core_pinned"):
        assert {entry[name] for entry in found} == {0}
    for name in ("modules", "tensors"):
        assert len({entry[name] for entry in found[1:]}) == 1, [entry[name] for entry in found]


@needs_linux
@pytest.mark.slow
def test_leaks_would_be_seen(root: Path, comfyui_path: Path, twins: Any) -> None:
    """Less than a megabyte that a cycle keeps. Fewer cycles would keep no more than what varies between them."""
    found = run(root, comfyui_path, twins, "100", "--leak", "tensors")
    assert growth(found) > 1.02
    assert found[-1]["tensors"] > found[1]["tensors"]
    assert run(root, comfyui_path, twins, "10", "--leak", "slab")[-1]["host"] > 0
