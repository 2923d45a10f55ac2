"""Encoding float8: the nearest number of all that there are, ties to even, the largest beyond the range."""

from __future__ import annotations

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.formats.scaled import scaled_format
from snug.quant_backends.kernels import dequantize as kernel
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed

STORED = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
# Largest error of a weight, relative and in units of the scale (half the smallest subnormal number).
ERRORS = {"float8_e4m3fn": (2**-4, 2**-10), "float8_e5m2": (2**-3, 2**-17)}


@pytest.fixture(params=[None, 64], ids=["one chunk", "many chunks"], autouse=True)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(kernel, "weights_per_chunk", lambda device: request.param)


def nearest(values: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """By comparing with every finite number of the type; of two equally near ones the even code."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes.view(stored).float().isfinite()]
    numbers = codes.view(stored).double()
    distances = (values.double().reshape(-1, 1) - numbers).abs()
    least = distances.min(1, keepdim=True).values
    even = torch.where(distances == least, codes % 2, 2)
    return numbers[even.min(1).indices].view(values.shape)


@pytest.mark.parametrize("stored", STORED)
def test_rounds_to_the_nearest_and_saturates(stored: str) -> None:
    dtype = getattr(torch, stored)
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    beyond = torch.tensor([1e5, -1e5, 1e9, -1e9])
    above, below = between.nextafter(torch.tensor(1e9)), between.nextafter(torch.tensor(-1e9))
    values = torch.cat([numbers, between, above, below, beyond])
    packed = quantize_packed(values.view(-1, 1), scaled_format(f"{stored}-tensor"))
    assert torch.equal(dequantize_packed(packed).view(-1).double(), nearest(values, dtype))
    infinite = torch.tensor([[torch.inf, -torch.inf, torch.nan]])
    found = dequantize_packed(quantize_packed(infinite, packed.format))[0]
    assert found[:2].tolist() == [numbers.max().item(), numbers.min().item()]
    assert found[2].isnan()


@pytest.mark.parametrize("stored", ERRORS)
def test_inside_the_range_it_is_torchs_cast(stored: str) -> None:
    values = torch.randn(64, 33, generator=torch.Generator().manual_seed(1))
    packed = quantize_packed(values, scaled_format(f"{stored}-tensor"))
    assert torch.equal(packed.data.view(torch.uint8), values.to(getattr(torch, stored)).view(torch.uint8))
    assert packed.parts["scale"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("stored", ERRORS)
def test_error_bound(stored: str, by_row: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(12, 8, 3, 3, generator=generator) * torch.logspace(-3, 1, 12).view(-1, 1, 1, 1)
    values = values.to(dtype)
    values[3] = 0
    before = values.clone()
    packed = quantize_packed(values, scaled_format(f"{stored}-{'rows' if by_row else 'tensor'}"))
    assert torch.equal(values, before), "the input must stay as it is"
    relative, absolute = ERRORS[stored]
    scale = packed.parts["scale"].double().view(-1, 1, 1, 1)
    error = (dequantize_packed(packed).double() - values.double()).abs()
    bound = torch.maximum(values.double().abs() * relative, scale * absolute)
    assert (error <= bound * (1 + 1e-6)).all()
    assert torch.equal(dequantize_packed(packed)[3], torch.zeros(8, 3, 3))
    assert packed.nbytes == values.numel() + (12 * 4 if by_row else 4)


@pytest.mark.parametrize("stored", ERRORS)
def test_rows_use_the_whole_range(stored: str) -> None:
    values = torch.randn(5, 16, generator=torch.Generator().manual_seed(3)) * 1e-20
    values[2, 3] = torch.inf
    values[3, 0] = 3e38
    packed = quantize_packed(values, scaled_format(f"{stored}-rows"))
    largest = torch.finfo(getattr(torch, stored)).max
    assert (packed.data.float().abs().amax(1) == largest).all()
    assert dequantize_packed(packed).isfinite().all()


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("float8_e4m3fn-rows", (0.026, 0.026, 0.026)),
        ("float8_e4m3fn-tensor", (0.033, 0.057, 0.19)),
        ("float8_e5m2-rows", (0.053, 0.053, 0.053)),
        ("float8_e5m2-tensor", (0.053, 0.053, 0.053)),
    ],
)
def test_error_of_usual_weights(name: str, errors: tuple[float, ...]) -> None:
    """What the help page says, for weights of the sizes 0.02, 0.01 and 0.003."""
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    for size, error in zip((0.02, 0.01, 0.003), errors, strict=True):
        found = dequantize_packed(quantize_packed(values * size, scaled_format(name)))
        assert ((found - values * size).norm() / (values * size).norm()).item() == pytest.approx(
            error, rel=0.03
        )


@pytest.mark.parametrize("name", ["float8_e4m3fn-128x128", "uint8-rows"])
def test_formats_that_are_only_read(name: str) -> None:
    with pytest.raises(SnugError, match=f"{name}.*does not write"):
        quantize_packed(torch.zeros(128, 128), scaled_format(name))
