"""Products in 8 bits from a weight in any format: the formula in float64, and what rotating the channels is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.formats.scaled import scaled_format
from snug.quant_backends.kernels import device_products, fast_matmul
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed
from snug.quant_backends.kernels.fast_matmul import FLOAT8, INT8

STORED = (INT8, FLOAT8)
SOURCES = ("Q4_0", "Q6_K", "BF16", "bnb-nf4-64", "float8_e4m3fn-rows", "int8-rows", "int8-rows-rotated-256")


def source(name: str, rows: int = 48, columns: int = 512) -> PackedTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return quantize_packed(weight, FORMATS.get(name) or scaled_format(name))


def with_outliers(rows: int, columns: int) -> torch.Tensor:
    """Activations as transformers have them: a few channels many times larger than the others."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, columns, generator=generator)
    x[:, ::61] *= 30
    return x


def hadamard(width: int) -> torch.Tensor:
    """The Kronecker power of the matrix in `formats.rotation`, float64."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.kron(matrix, four)
    return matrix / width**0.5


def rounded(values: torch.Tensor, stored: str) -> torch.Tensor:
    """float64 values [m, k] with each row rounded to 8 bits."""
    largest = 127.0 if stored == INT8 else 448.0
    scale = (values.abs().amax(1, keepdim=True) / largest).clamp_min(1e-30)
    codes = values / scale
    codes = codes.round() if stored == INT8 else codes.float().to(torch.float8_e4m3fn).double()
    return codes * scale


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", SOURCES)
def test_equals_the_formula(name: str, stored: str) -> None:
    packed, x = source(name), with_outliers(40, 512)
    dense = dequantize_packed(packed).double()
    weight = fast_matmul.rounded_already(packed, stored) or fast_matmul.round_weight(
        packed, stored, torch.float32
    )
    matrix = hadamard(weight.width)
    rotate = lambda values: (values.view(len(values), -1, weight.width) @ matrix).flatten(1)  # noqa: E731
    assert weight.width == (256 if stored == INT8 else 1)
    bias = torch.randn(48)
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 1e-2)):
        given = x.to(dtype)
        wanted = rounded(rotate(given.double()), stored) @ rounded(rotate(dense), stored).t() + bias.double()
        found = fast_matmul.rounded_linear(given, weight, bias.to(dtype))
        assert found.dtype == dtype
        # Codes on the border between two steps may fall to either side.
        assert error(found, wanted) < tolerance
    assert error(fast_matmul.restored(weight), dense) < (0.012 if stored == INT8 else 0.04)


def test_weights_that_are_rounded_already_share_their_bytes() -> None:
    for name, stored in (
        ("int8-rows-rotated-256", INT8),
        ("float8_e4m3fn-rows", FLOAT8),
        ("float8_e4m3fn-tensor", FLOAT8),
    ):
        packed = source(name)
        weight = fast_matmul.rounded_already(packed, stored)
        assert weight is not None and weight.codes.data_ptr() == packed.data.data_ptr()
        assert error(fast_matmul.restored(weight), dequantize_packed(packed)) < 1e-6
        assert fast_matmul.rounded_already(packed, FLOAT8 if stored == INT8 else INT8) is None
    assert fast_matmul.rounded_already(source("int8-rows"), INT8) is None, "outliers would ruin it"


def test_rotating_tames_outlier_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = source("Q8_0", 256, 1024), with_outliers(64, 1024)
    exact = x.double() @ dequantize_packed(packed).double().t()

    def found(stored: str) -> float:
        weight = fast_matmul.round_weight(packed, stored, torch.float32)
        return error(fast_matmul.rounded_linear(x, weight), exact)

    errors = {"rotated": found(INT8), "float8": found(FLOAT8)}
    monkeypatch.setattr(fast_matmul, "WIDTHS", ())
    errors["plain"] = found(INT8)
    assert errors["rotated"] < 0.015
    assert errors["rotated"] < errors["float8"] < 0.045
    assert errors["plain"] > 3 * errors["rotated"], errors


def test_widths_by_the_number_of_columns() -> None:
    widths = [fast_matmul.rotation_width(INT8, columns) for columns in (3072, 2432, 1040, 36, 30)]
    assert widths == [256, 64, 16, 4, 1]
    for columns in (320, 36, 30):
        packed = quantize_packed(torch.randn(16, columns), FORMATS["F16"])
        x = torch.randn(33, columns)
        exact = x @ dequantize_packed(packed).t()
        weight = fast_matmul.round_weight(packed, INT8, torch.float32)
        assert error(fast_matmul.rounded_linear(x, weight), exact) < 0.015


def test_zeros_stay_zeros() -> None:
    packed = quantize_packed(torch.zeros(16, 256), FORMATS["F16"])
    for stored in STORED:
        weight = fast_matmul.round_weight(packed, stored, torch.float32)
        assert not fast_matmul.rounded_linear(torch.zeros(2, 40, 256), weight).any()


def test_a_kernel_is_used_only_when_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such device is here: its kernel is a function that rotates, rounds and multiplies, or goes wrong."""
    cpu = torch.device("cpu")
    outcomes = {"right": 1.0, "wrong": 1.1}

    def kernel(kind: str) -> Any:
        def product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: Any) -> torch.Tensor:
            if kind not in outcomes:
                raise RuntimeError("no kernel image is available")
            values = (x.double().view(len(x), -1, 256) @ hadamard(256)).flatten(1)
            result = rounded(values, INT8) @ (codes.double() * scale[:, None]).t() * outcomes[kind]
            return (result if bias is None else result + bias).to(x.dtype)

        return product

    problems = {
        kind: device_products._problem(kernel(kind), cpu, torch.bfloat16, INT8, 256)
        for kind in (*outcomes, "broken")
    }
    assert problems["right"] is None
    assert "an error of" in (problems["wrong"] or "")
    assert problems["broken"] == "RuntimeError: no kernel image is available"
    assert device_products.device_product(cpu, torch.float32, INT8, 256) is None


def test_comfy_kitchens_own_reference_agrees() -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    if not hasattr(kitchen, "int8_linear"):
        pytest.skip("this comfy-kitchen has no int8_linear")
    packed, x = source("Q6_K"), with_outliers(40, 512)
    weight = fast_matmul.round_weight(packed, INT8, torch.float32)
    scale = weight.scale.view(-1, 1)
    wanted = kitchen.int8_linear(
        x, weight.codes, scale, None, out_dtype=torch.float32, convrot=True, convrot_groupsize=256
    )
    assert error(fast_matmul.rounded_linear(x, weight), wanted) < 2e-3
