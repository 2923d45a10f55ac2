"""Calibrated layers: outlier channels are made smaller, ranges are used to the full, and rounding stays bounded."""

from __future__ import annotations

import pytest
import torch
from snug.quant_backends.formats.eight_bit_products import EightBitProducts
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed
from snug.quant_backends.kernels.linear import linear
from snug.quant_backends.quantization.activations import encode_calibrated
from snug.quant_backends.quantization.calibration import LayerStatistics
from snug.quant_backends.quantization.module import quantize_module
from snug.quant_backends.quantization.recording import Recorder

INT8 = EightBitProducts("int8", "static")


def gelu(seed: int) -> torch.Tensor:
    return torch.nn.functional.gelu(rows(seed) * 2)


def rows(seed: int, count: int = 400) -> torch.Tensor:
    return torch.randn(count, 128, generator=torch.Generator().manual_seed(seed))


def outlier_channels(seed: int) -> torch.Tensor:
    factor = torch.ones(128)
    factor[::32] = 40
    return rows(seed) * factor


def outlier_rows(seed: int) -> torch.Tensor:
    x = rows(seed)
    x[::50] *= 60
    return x


def statistics_of(layer: torch.nn.Linear, x: torch.Tensor) -> LayerStatistics:
    network = torch.nn.Sequential(layer)
    with Recorder(network) as recorder:
        network(x)
    return recorder.calibration().layers["0"]


def without_sample(seen: LayerStatistics) -> LayerStatistics:
    return LayerStatistics(seen.mean_square, seen.absmax, seen.range, seen.rows)


def errors(make, fmt: EightBitProducts = INT8) -> tuple[str, float, float]:
    """(format, error calibrated, error dynamic) for rows that were not recorded."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 96)
    with torch.no_grad():
        found = encode_calibrated(layer.weight, fmt, statistics_of(layer, make(1)))
        plain = quantize_packed(layer.weight, EightBitProducts(fmt.stored))
        x = make(2)
        exact = x.double() @ layer.weight.double().t()
        return (
            found.format.name,
            *(((linear(x, w) - exact).norm() / exact.norm()).item() for w in (found, plain)),
        )


@pytest.mark.parametrize(
    ("make", "kind", "ratio"),
    [(gelu, "static", 1.05), (outlier_channels, "static", 0.7), (outlier_rows, "smooth", 1.01)],
)
def test_held_back_rows(make, kind: str, ratio: float) -> None:
    name, calibrated, dynamic = errors(make)
    assert name == f"product-int8-{kind}"
    assert calibrated <= ratio * dynamic


def test_float8() -> None:
    fmt = EightBitProducts("float8_e4m3fn", "static")
    _, calibrated, dynamic = errors(outlier_channels, fmt)
    assert calibrated <= 1.05 * dynamic
    layer = torch.nn.Linear(128, 96)
    seen = statistics_of(layer, gelu(1))
    with torch.no_grad():
        found = encode_calibrated(layer.weight, fmt, without_sample(seen))
        x = gelu(2)
        exact = x @ layer.weight.t()
        assert found.format == fmt
        assert (linear(x, found) - exact).norm() / exact.norm() < 0.05


def test_the_range_is_used_whole() -> None:
    """Inputs between -0.17 and 8 do not waste half of the codes; a part is left for other prompts."""
    layer = torch.nn.Linear(128, 96)
    with torch.no_grad():
        found = encode_calibrated(layer.weight, INT8, without_sample(statistics_of(layer, gelu(1))))
    x = gelu(1)
    codes = (x * found.parts["factor"] + found.parts["shift"]).round()
    assert -100 < codes.min() < -90
    assert 90 < codes.max() < 100


@pytest.mark.parametrize("x", [torch.zeros(64, 128), torch.ones(64, 128), rows(1) * (torch.arange(128) == 3)])
def test_silent_and_constant_channels(x: torch.Tensor) -> None:
    layer = torch.nn.Linear(128, 96)
    with torch.no_grad():
        found = encode_calibrated(layer.weight, INT8, statistics_of(layer, x))
        result = linear(x, found, layer.bias)
        assert torch.isfinite(result).all()
        torch.testing.assert_close(result, layer(x), rtol=0.02, atol=0.02)
        assert (dequantize_packed(found) - layer.weight).abs().max() < 0.1


def test_without_a_sample_it_is_static() -> None:
    layer = torch.nn.Linear(128, 96)
    seen = statistics_of(layer, gelu(1))
    with torch.no_grad():
        assert encode_calibrated(layer.weight, INT8, without_sample(seen)).format == INT8


def test_a_module_in_place() -> None:
    """Recorded and quantized outside ComfyUI; what did not run has no scale of its own."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    network.add_module("unused", torch.nn.Linear(128, 64))
    run = torch.nn.Sequential(*list(network)[:3])
    with torch.no_grad():
        with Recorder(run) as recorder:
            run(outlier_channels(1))
        found = recorder.calibration().layers
        exact = run(outlier_channels(2))
        report = quantize_module(network, "INT8 static", skip="", statistics=found)
        result = network[2](network[1](network[0](outlier_channels(2))))
    assert set(report.quantized) == {"0", "2", "unused"}
    assert report.quantized["0"] == "product-int8-static"
    assert report.quantized["unused"] == "product-int8-dynamic"
    assert 1e-3 < ((result - exact).norm() / exact.norm()).item() < 0.05
