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


def test_a_node_is_reported_within_a_percent() -> None:
    """Started and finished as ComfyUI's progress handler does it."""
    from snug.nodes.telemetry.counters import Counters, main_device
    from snug.nodes.telemetry.record import PromptRecord

    counters, device = Counters(), main_device()
    record = PromptRecord("prompt", device, 0.0)
    record.open("1", "Take #1", 1.0, counters.read())
    values = torch.ones(EXPECTED, dtype=torch.uint8, device=device)
    kept = values[: EXPECTED // 2].clone()
    del values
    record.close("1", 2.0, counters.read())
    (node,) = record.nodes()
    assert node.added(device) == pytest.approx(EXPECTED + kept.nbytes, rel=0.01)
    assert node.kept(device) == pytest.approx(kept.nbytes, rel=0.01)


def test_running_out_of_memory_is_counted() -> None:
    from snug.nodes.telemetry.counters import Counters, main_device

    counters, device = Counters(), main_device()
    before = counters.read()[device]
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    after = counters.read()[device]
    assert after.ooms == before.ooms + 1 and after.retries >= before.retries


def test_parts_of_the_device() -> None:
    from snug.nodes.telemetry.devices import read_devices

    values = torch.ones(EXPECTED, dtype=torch.uint8, device="cuda")
    parts, _ = read_devices([], resident=1 << 30)
    assert parts.activations == torch.cuda.memory_allocated() >= values.nbytes
    assert parts.cache == torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    taken = parts.weights + parts.pages + parts.activations + parts.cache + parts.other
    assert taken + parts.free == parts.total
    assert parts.other > 0  # the driver's own
