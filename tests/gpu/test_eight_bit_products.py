"""On a CUDA device: products in 8 bits equal those on the CPU, and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.linear import linear
from snug.quant_backends.quantization import LayerInfo, make_recipe, product_targets
from snug.quant_backends.quantization.calibration import LayerStatistics
from snug.quant_backends.quantization.module import move

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def packed(target: str) -> PackedTensor:
    layer, (absmax, span) = LayerInfo("x", (256, 512)), (torch.ones(512) * 4, torch.tensor([-3.0, 4.0]))
    seen = LayerStatistics(absmax, absmax, span, 10)
    weight = torch.randn(layer.shape, generator=torch.Generator().manual_seed(1)) / 20
    found = make_recipe(target, [layer], skip="", statistics={"x": seen}).quantize(layer, weight)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", list(product_targets()))
def test_the_same_as_on_the_cpu(target: str, dtype: torch.dtype) -> None:
    weight = packed(target)
    x = torch.randn(2, 80, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[:, :, ::60] *= 4
    wanted = linear(x.float(), weight)
    there, on_device = move(weight, torch.device("cuda")), x.cuda()
    with torch.no_grad():
        linear(on_device, there)  # what libraries set up at their first call may wait
        with waiting_is_an_error():
            found = linear(on_device, there)
    assert (found.cpu().float() - wanted).norm() < 0.01 * wanted.norm()
