"""On a CUDA device: kernels are recorded in CUDA graphs, and a forward neither waits for the GPU nor keeps memory."""

from __future__ import annotations

import pytest
import torch
from kernel_device import on_device
from random_packed import random_packed
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.kernels.dispatch import TRITON, most_tokens, using
from snug.quant_backends.kernels.fast_matmul import FLOAT8, INT8, prepare, round_weight, rounded_linear
from snug.quant_backends.kernels.linear import linear
from snug.quant_backends.kernels.low_rank import decode_merged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = [name for name, fmt in FORMATS.items() if fmt.dtype is None]
NAMES += [
    "bnb-nf4-64-nested-256",
    "int8-rows",
    "float8_e4m3fn-tensor",
    "quanto-int4-128",
    "int8-rows-rotated-256",
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_of_a_forward_equals_the_forward(name: str) -> None:
    packed = on_device(random_packed(name, (256, 1024)))
    cap = most_tokens(DEVICE, torch.bfloat16)
    inputs = [torch.randn(n, 1024, device=DEVICE, dtype=torch.bfloat16) for n in (1, min(16, cap), cap + 1)]
    up, down = torch.randn(256, 16, device=DEVICE), torch.randn(16, 1024, device=DEVICE)

    def forward() -> list[torch.Tensor]:
        merged = decode_merged(packed, down, up, torch.bfloat16)
        return [merged, *(linear(x, packed) for x in inputs)]

    with using(TRITON), torch.inference_mode():
        expected = [result.clone() for result in forward()]  # compiles, and puts tables on the device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = forward()
        for _ in range(2):
            graph.replay()
    for found, wanted in zip(results, expected, strict=True):
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_neither_waits_nor_keeps_memory(name: str) -> None:
    packed = on_device(random_packed(name, (256, 1024)))
    x = torch.randn(3, 1024, device=DEVICE, dtype=torch.bfloat16)
    with using(TRITON), torch.inference_mode():
        linear(x, packed), dequantize_packed(packed, torch.bfloat16)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                linear(x, packed), dequantize_packed(packed, torch.bfloat16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("stored", [INT8, FLOAT8])
@pytest.mark.parametrize("name", [*NAMES, "BF16"])
def test_a_graph_of_a_product_in_8_bits(name: str, stored: str) -> None:
    """The weight is rounded in the call, nothing waits and nothing is kept."""
    packed = on_device(random_packed(name, (256, 1024)))
    x = torch.randn(48, 1024, device=DEVICE, dtype=torch.bfloat16)
    prepare(DEVICE, torch.bfloat16, stored)

    def forward() -> torch.Tensor:
        return rounded_linear(x, round_weight(packed, stored, torch.bfloat16))

    with using(TRITON), torch.inference_mode():
        expected = forward().clone()  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                forward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_allocated() == before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = forward()
        graph.replay()
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
