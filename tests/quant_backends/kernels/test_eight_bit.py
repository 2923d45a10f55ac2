"""Products in 8 bits equal the formula calculated in float64, however they are calculated."""

from __future__ import annotations

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats.eight_bit_products import EightBitProducts
from snug.quant_backends.formats.outlier_products import OutlierProducts
from snug.quant_backends.formats.scaled import scaled_format
from snug.quant_backends.kernels import eight_bit, outliers
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed
from snug.quant_backends.kernels.linear import linear

KINDS = {"int8": ("dynamic", "smooth", "static"), "float8_e4m3fn": ("dynamic", "static")}
FORMATS = [EightBitProducts(stored, kind) for stored, kinds in KINDS.items() for kind in kinds]
NAMES = [fmt.name for fmt in FORMATS]


def packed(fmt: EightBitProducts, rows: int = 24, columns: int = 40, seed: int = 0) -> PackedTensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    plain = quantize_packed(weight, EightBitProducts(fmt.stored))
    parts = {"scale": plain.parts["scale"]}
    step, shift = 4.0 / fmt.largest, 3.0
    if "factor" in fmt.part_names:
        parts["factor"] = torch.rand(columns, generator=generator) + 0.5
    if "step" in fmt.part_names:
        parts["step"] = torch.tensor([step])
    if "shift" in fmt.part_names:
        parts["factor"] = parts["factor"] / step
        parts["shift"] = torch.tensor([shift])
        sums = plain.data.double().sum(1)
        parts["offset"] = (-shift * step * plain.parts["scale"].double() * sums).float()
    return PackedTensor(plain.data, fmt, plain.shape, parts)


def expected(x: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Input and weight decoded from their codes, multiplied in float64."""
    fmt, parts = weight.format, weight.parts
    assert isinstance(fmt, EightBitProducts)
    u = x.float() * parts["factor"] if "factor" in parts else x.float()
    if "shift" in parts:
        u = u + parts["shift"]
        t = torch.ones(len(x), 1)
    elif "step" in parts:
        u, t = u / parts["step"], parts["step"]
    else:
        t = (u.abs().amax(1, keepdim=True) / fmt.largest).clamp_min(1e-30)
        u = u / t
    codes = u.round().clamp(-127, 127) if fmt.stored == "int8" else u.clamp(-448, 448).to(torch.float8_e4m3fn)
    restored = (codes.double() - parts.get("shift", torch.zeros(1)).double()) * t.double()
    if "factor" in parts:
        restored = restored / parts["factor"].double()
    result = restored @ dequantize_packed(weight).double().t()
    return result if bias is None else result + bias.double()


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_the_formula(fmt: EightBitProducts, dtype: torch.dtype) -> None:
    weight = packed(fmt)
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(2, 33, 40, generator=generator) * torch.rand(2, 33, 1, generator=generator) * 2).to(
        dtype
    )
    x[0, 0] = 0
    for bias in (None, torch.randn(24, generator=generator).to(dtype)):
        found = linear(x, weight, bias)
        assert found.dtype == dtype
        assert found.shape == (2, 33, 24)
        wanted = expected(x.reshape(-1, 40), weight, bias).view(2, 33, 24)
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
        exact = x.double() @ dequantize_packed(weight).double().t() + (0 if bias is None else bias.double())
        assert (found.double() - exact).norm() / exact.norm() > 1e-3, "the input is not rounded"


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_few_rows_and_gradients_use_the_decoded_weight(fmt: EightBitProducts) -> None:
    weight, x = packed(fmt), torch.randn(eight_bit.FEWEST_ROWS, 40)
    few = x[1:]
    dense = dequantize_packed(weight)
    assert torch.equal(linear(few, weight), torch.nn.functional.linear(few, dense))
    assert not torch.equal(linear(x, weight), torch.nn.functional.linear(x, dense))
    with torch.enable_grad():
        linear(x.requires_grad_(), weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 3, 5), (40, 1024, 8), (33, 5000, 24), (17, 8, 1)]
)
def test_sums_of_int8_are_exact(
    rows: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
    b = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    a[0], b[0] = 127, -128  # the largest sum that there can be
    wanted = (a.double() @ b.double().t()).to(torch.int32)
    assert torch.equal(eight_bit.codes_product(a, b), wanted)
    monkeypatch.setattr(eight_bit, "multiplies_int8", lambda device: False)
    assert torch.equal(eight_bit.codes_product(a, b), wanted)


def test_large_layers_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed(FORMATS[2]), torch.randn(200, 40)
    whole = linear(x, weight)
    monkeypatch.setattr(eight_bit, "_RESULTS", 24 * 50)
    assert torch.equal(linear(x, weight), whole)


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_names_and_decoding(fmt: EightBitProducts) -> None:
    assert scaled_format(fmt.name) == fmt
    weight = packed(fmt, rows=5, columns=9)
    column = torch.ones(9).double()
    if "factor" in weight.parts:
        column = weight.parts["factor"].double() * weight.parts.get("step", torch.ones(1)).double()
    wanted = weight.data.double() * weight.parts["scale"].double()[:, None] * column
    torch.testing.assert_close(dequantize_packed(weight).double(), wanted, rtol=1e-6, atol=0)


def test_rows_of_zeros_and_edges_encode() -> None:
    values = torch.tensor([[0.0, 0.0], [1e-42, 0.0], [3e38, -3e38], [-2.0, 1.0]])
    for stored, error in (("int8", 1 / 254), ("float8_e4m3fn", 1 / 16)):
        decoded = dequantize_packed(quantize_packed(values, EightBitProducts(stored)))
        assert torch.isfinite(decoded).all()
        largest = values.abs().amax(1) if stored == "int8" else values.abs().amax()
        assert (decoded - values).abs().amax(1).le(error * largest + 1e-37).all()


@pytest.mark.parametrize("threshold", [6.0, 2.5, 0.0])
@pytest.mark.parametrize("loud", [0, 5, 30])
def test_llm_int8_equals_bitsandbytes(threshold: float, loud: int) -> None:
    """MatMul8bitLt, which multiplies input columns with outliers in 16 bits: within what rounding to 16 bits leaves."""
    functions = pytest.importorskip(
        "bitsandbytes.autograd._functions", reason="bitsandbytes is not installed"
    )
    generator = torch.Generator().manual_seed(loud)
    values = torch.randn(96, 512, generator=generator) / 20
    x = torch.randn(2, 40, 512, generator=generator).clamp(-2.4, 2.4).half()
    x[:, ::3, : 9 * loud : 9] *= 8
    bias = torch.randn(96, generator=generator).half()
    weight = quantize_packed(values, OutlierProducts(threshold))
    state = functions.MatmulLtState()
    state.has_fp16_weights, state.threshold = False, threshold
    state.CB, state.SCB = weight.data, weight.parts["scale"].view(-1)
    wanted = functions.MatMul8bitLt.apply(x, state.CB, None, bias, state)
    found = linear(x, weight, bias)
    assert found.dtype == torch.float16 and found.shape == (2, 40, 96)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=4e-3 * wanted.std().item())
    if loud and threshold:
        plain = linear(x, quantize_packed(values, OutlierProducts(0)), bias).float()
        exact = x.float() @ dequantize_packed(weight).t() + bias.float()
        assert (plain - exact).norm() > 2 * (found.float() - exact).norm(), "the outliers are rounded"


def test_more_outliers_than_columns_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest of them are rounded with the rest: no input is lost."""
    monkeypatch.setattr(outliers, "FEWEST", 4)
    x = torch.randn(64, 64)
    x[:, :8] *= torch.arange(8, 16) * 10
    weight = quantize_packed(torch.randn(24, 64), OutlierProducts(6.0))
    exact = x @ dequantize_packed(weight).t()
    assert (linear(x, weight) - exact).norm() < 0.01 * exact.norm()


def test_thresholds_have_names() -> None:
    for threshold, name in ((6.0, "6"), (0.0, "0"), (2.25, "2.25")):
        fmt = OutlierProducts(threshold)
        assert fmt.name == f"product-int8-scb-{name}" and scaled_format(fmt.name) == fmt
    for wrong in (-1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(SnugError, match="is a number from 0 to 999999"):
            OutlierProducts(wrong)
