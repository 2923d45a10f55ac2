"""Changed weights in their old format again: the error stays what the format's own rounding makes."""

from __future__ import annotations

import pytest
import torch
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.formats.scaled import ScaledElements, scaled_format
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize, quantize_packed
from snug.quant_backends.kernels.requantize import can_requantize, requantize


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 0.02


def error(packed: PackedTensor, values: torch.Tensor) -> float:
    return ((dequantize_packed(packed) - values).norm() / values.norm()).item()


@pytest.mark.parametrize(("name", "limit"), [("Q8_0", 0.006), ("Q4_0", 0.1), ("BF16", 0.003), ("F32", 0.0)])
def test_ggml(name: str, limit: float) -> None:
    values = weights(8, 64)
    like = quantize_packed(torch.zeros_like(values), FORMATS[name])
    assert can_requantize(like)
    assert error(requantize(values, like), values) <= limit


def test_blocks_that_cross_rows() -> None:
    values = weights(32, 4, 3, 3)
    data = quantize(values.view(-1, 32), FORMATS["Q8_0"]).view(-1)
    new = requantize(values, PackedTensor(data, FORMATS["Q8_0"], (32, 4, 3, 3)))
    assert new.shape == (32, 4, 3, 3)
    assert error(new, values) < 0.006


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["float8_e4m3fn-tensor", "float8_e5m2-tensor"])
def test_a_float8_tensor_keeps_its_kind_of_scale(name: str, scale_dtype: torch.dtype) -> None:
    """A scale of its own is chosen anew; without one the numbers themselves are rounded."""
    fmt, values = scaled_format(name), weights(16, 64) * 0.01
    assert isinstance(fmt, ScaledElements)
    data = torch.zeros(16, 64).to(fmt.data_dtype)
    scaled = requantize(
        values, PackedTensor(data, fmt, (16, 64), {"scale": torch.full((1,), 1e-3, dtype=scale_dtype)})
    )
    assert scaled.parts["scale"].dtype == scale_dtype and scaled.parts["scale"].shape == (1,)
    assert error(scaled, values) < (0.04 if "e4m3" in name else 0.08)
    plain = requantize(values, PackedTensor(data, fmt, (16, 64), {"scale": torch.ones(())}))
    assert torch.equal(dequantize_packed(plain), values.to(fmt.data_dtype).float())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1e-5])
def test_a_float8_tensor_of_zeros_or_next_to_them(size: float, scale_dtype: torch.dtype) -> None:
    fmt, values = scaled_format("float8_e4m3fn-tensor"), weights(16, 64) * size
    assert isinstance(fmt, ScaledElements)
    parts = {"scale": torch.full((), 0.5, dtype=scale_dtype)}
    like = PackedTensor(torch.zeros(16, 64).to(fmt.data_dtype), fmt, (16, 64), parts)
    assert torch.allclose(dequantize_packed(requantize(values, like)), values, atol=size / 5)


@pytest.mark.parametrize("name", ["int8-rows", "int8-rows-scb", "int8-rows-zero"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_int8_rows(name: str, scale_dtype: torch.dtype) -> None:
    values = weights(16, 64)
    values[3] = 0
    values[5] *= 100
    parts = {"scale": torch.ones(16, 1, dtype=scale_dtype)}
    if "zero" in name:
        parts["zero"] = torch.ones(16, 1, dtype=torch.int8)
    like = PackedTensor(torch.zeros(16, 64, dtype=torch.int8), scaled_format(name), (16, 64), parts)
    new = requantize(values, like)
    assert can_requantize(like) and new.format == like.format and new.parts.keys() == parts.keys()
    assert new.parts["scale"].dtype == scale_dtype
    found = dequantize_packed(new)
    step = values.abs().amax(1, keepdim=True) / 127
    assert ((found - values).abs() <= 0.51 * step + (0 if scale_dtype == torch.float32 else step / 8)).all()
    assert not found[3].any()


def test_formats_that_are_only_read() -> None:
    for name in ("IQ3_S", "NVFP4"):
        fmt = FORMATS[name]
        like = PackedTensor(torch.zeros(fmt.nbytes((4, 256)), dtype=torch.uint8), fmt, (4, 256))
        assert not can_requantize(like)
