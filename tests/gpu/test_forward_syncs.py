"""On a CUDA device: a layer's forward after warm-up waits for nothing, uploads nothing and keeps no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forward_trace import trace
from tiny import use_comfyui
from traced_layers import BRANCH, COLUMNS, EVERY, MERGED, PLAIN, TOKENS, make_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.comfy,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda:0"


@pytest.fixture(scope="module", autouse=True)
def comfy(comfyui_path: Path) -> None:
    use_comfyui(comfyui_path, "--highvram")
    import comfy.sd

    assert comfy.sd


@pytest.fixture
def refuse_syncs() -> Iterator[Callable[[], None]]:
    """From the call on, whatever makes the host wait for the device fails."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def _memory() -> dict[str, Any]:
    stats = torch.cuda.memory_stats(DEVICE)
    return {name: stats[f"{name}.all.current"] for name in ("allocated_bytes", "active_bytes", "allocation")}


@pytest.mark.parametrize("lora", [PLAIN, MERGED, BRANCH])
@pytest.mark.parametrize("format", EVERY)
def test_no_sync_and_nothing_kept(format: str, lora: str, refuse_syncs: Callable[[], None]) -> None:
    with torch.inference_mode():
        layer = make_layer(format, DEVICE, lora)
        x = torch.randn(TOKENS, COLUMNS, dtype=torch.bfloat16, device=DEVICE)
        for _ in range(3):
            layer(x)
        before = _memory()
        refuse_syncs()
        result = layer(x)
        del result
        assert _memory() == before
        found, _ = trace(lambda: layer(x))
    assert found.reads == found.copies == found.constants == found.subclasses == []


@pytest.mark.parametrize("rows", [1, TOKENS])
@pytest.mark.parametrize("format", EVERY)
def test_a_forward_can_be_captured_as_a_graph(format: str, rows: int) -> None:
    with torch.inference_mode():
        layer = make_layer(format, DEVICE, PLAIN)
        x = torch.randn(rows, COLUMNS, dtype=torch.bfloat16, device=DEVICE)
        expected = [layer(x) for _ in range(3)][-1]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = layer(x)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())
