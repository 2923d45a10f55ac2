"""A layer's forward after warm-up: no host read, no copy between devices, no constant made, nothing kept.

On the CPU torch's dispatcher is traced where it really calculates; on the meta device the code takes the way that it
takes on a GPU, and any look at a value fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward_trace import ForwardTrace, trace
from snug.quant_backends.kernels import linear as kernel
from snug.quant_backends.kernels.native import torch_only
from traced_layers import BRANCH, COLUMNS, EVERY, MERGED, PLAIN, TOKENS, make_layer


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CPU_TILE", 16 * COLUMNS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("lora", [PLAIN, MERGED, BRANCH])
@pytest.mark.parametrize("format", EVERY)
def test_a_forward_reads_copies_makes_and_keeps_nothing(format: str, lora: str, device: str) -> None:
    layer = make_layer(format, device, lora)
    x = torch.randn(TOKENS, COLUMNS, dtype=torch.bfloat16, device=device)
    with torch.inference_mode(), torch_only():
        found, result = trace(lambda: layer(x))
    assert result.device.type == device
    assert found.count > 0
    if device != "cpu":  # where a look at the weights' bytes waits for nothing
        assert found.reads == []
    assert found.copies == []
    assert found.constants == []
    assert found.subclasses == []
    assert found.kept() == 1  # the result
    del result
    assert found.kept() == 0


def test_the_trace_sees_what_it_is_to_see() -> None:
    x, there, store = torch.ones(3), torch.ones(3, device="meta"), []

    def traced(call: Any) -> ForwardTrace:
        return trace(call, warm_up=0)[0]

    assert traced(lambda: x.sum().item()).reads == ["_local_scalar_dense"]
    assert traced(lambda: x.nonzero()).reads == ["nonzero"]
    assert traced(lambda: bool(x.any())).reads
    assert traced(lambda: torch.tensor([1.0, 2.0])).constants
    assert traced(lambda: torch.arange(3)).constants == ["arange"]
    assert traced(lambda: x.to("meta")).copies == ["_to_copy"]
    assert traced(lambda: there.copy_(x)).copies == ["copy_"]
    assert traced(lambda: there * torch.tensor(2.0)).copies == []
    assert traced(lambda: store.append(x + 1)).kept() == 1
    assert traced(lambda: (x + 1).sum()).kept() == 0
    with pytest.raises(RuntimeError):
        there.sum().item()
