"""On a CUDA device: a known amount is in the counters, and the parts are what torch says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import use_comfyui

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.comfy,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MEGABYTES = 256
EXPECTED = MEGABYTES << 20


@pytest.fixture(autouse=True)
def comfy(comfyui_path: Path) -> None:
    use_comfyui(comfyui_path)


def test_a_known_amount_is_reported_within_a_percent() -> None:
    from snug.nodes.telemetry.counters import Counters, main_device

    counters, device = Counters(), main_device()
    assert device.startswith("cuda")
    before = counters.read()[device]
    values = torch.ones(EXPECTED, dtype=torch.uint8, device=device)
    del values
    after = counters.read()[device]
    assert after.peak - before.current == pytest.approx(EXPECTED, rel=0.01)
    assert after.current == before.current
    assert counters.read()[device].peak == after.current  # was set back


def test_parts_of_the_device() -> None:
    from snug.nodes.telemetry.devices import read_devices

    values = torch.ones(EXPECTED, dtype=torch.uint8, device="cuda")
    parts, _ = read_devices([], resident=1 << 30)
    assert parts.activations == torch.cuda.memory_allocated() >= values.nbytes
    assert parts.cache == torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    taken = parts.weights + parts.pages + parts.activations + parts.cache + parts.other
    assert taken + parts.free == parts.total
    assert parts.other > 0  # the driver's own
