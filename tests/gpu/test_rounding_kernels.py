"""Triton rounds weights and inputs to 8 bits to the same codes and scales as torch, on a CUDA device or interpreted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kernel_device import DEVICE, needs_kernels, on_device
from random_packed import random_packed
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.formats.scaled import format_called
from snug.quant_backends.kernels import dispatch
from snug.quant_backends.kernels.dequantize import encode, quantize_packed
from snug.quant_backends.kernels.dispatch import (
    TORCH,
    TRITON,
    round_tokens_by_kernel,
    round_weight_by_kernel,
    rounds_by_kernel,
    using,
)
from snug.quant_backends.kernels.fast_matmul import FLOAT8, INT8, fewest_tokens, round_weight, rounded_linear
from snug.quant_backends.kernels.rounding import exactly_rounded, rounded_tokens

pytestmark = needs_kernels
GGML = [name for name, fmt in FORMATS.items() if fmt.dtype is None]
PLAIN = ["F32", "F16", "BF16"]
SCALED = [
    "bnb-nf4-64",
    "bnb-fp4-64-nested-4",
    "int8-rows",
    "int8-rows-scb",
    "int8-1x32-zero",
    "int8-2x8-zero",
    "uint8-1x64-zero",
    "float8_e4m3fn-tensor",
    "float8_e4m3fn-128x128",
    "float8_e5m2-rows",
    "quanto-int4-128",
    "quanto-int2-64",
    "int8-rows-rotated-64",
    "int8-rows-rotated-256",
]
Rounded = tuple[torch.Tensor, torch.Tensor]


def assert_same(found: Rounded | None, expected: Rounded) -> None:
    """The same bits, but for the codes of rows whose scale is NaN or infinite: they are never seen."""
    assert found is not None
    codes, scales = (tensor.cpu() for tensor in found)
    assert codes.dtype == expected[0].dtype and codes.shape == expected[0].shape
    assert torch.equal(scales.nan_to_num(nan=-1), expected[1].nan_to_num(nan=-1))
    seen = expected[1].isfinite()
    assert torch.equal(codes.view(torch.int8)[seen], expected[0].view(torch.int8)[seen])


def assert_rounded(packed: PackedTensor, stored: str, width: int) -> None:
    with using(TORCH):
        expected = exactly_rounded(packed, stored, width)
    with using(TRITON):
        assert_same(round_weight_by_kernel(on_device(packed), stored, width), expected)


@pytest.mark.parametrize("name", [*GGML, *SCALED])
def test_every_format(name: str) -> None:
    # Random bytes: infinities and NaN, too. Two tiles, of two rows, one behind the matrix; and one tile of one row.
    assert_rounded(random_packed(name, (3, 1280)), INT8, 256)
    assert_rounded(random_packed(name, (1, 256), seed=1), FLOAT8, 1)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_numbers(name: str) -> None:
    values = torch.randn(5, 4, 80, generator=torch.Generator().manual_seed(0))
    values[0], values[1] = 0, torch.tensor(2.0**-24)
    values[2, 0, 0], values[3, 0, 0] = torch.inf, torch.nan
    packed = quantize_packed(values.view(5, 320), FORMATS[name])
    for stored, width in ((INT8, 64), (INT8, 1), (FLOAT8, 1)):
        assert_rounded(packed, stored, width)
    assert_rounded(quantize_packed(values.view(-1)[:30].view(1, 30), FORMATS[name]), INT8, 1)


@pytest.mark.parametrize(("columns", "width"), [(4, 4), (48, 16), (2432, 64), (1040, 16), (36, 4)])
def test_widths_and_numbers_of_columns(columns: int, width: int) -> None:
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    packed = quantize_packed(values, format_called("int8-rows"))
    assert_rounded(packed, INT8, width)


@pytest.mark.parametrize("stored", [INT8, FLOAT8])
def test_numbers_between_two_codes_fall_to_the_even_one(stored: str) -> None:
    # The first column makes the scale a power of two, so that quotients are these numbers.
    if stored == INT8:
        steps, largest = torch.arange(-127, 127) + 0.5, 127.0
    else:
        codes = torch.arange(0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        between = (codes[1:] + codes[:-1]) / 2  # the subnormal ones, too
        steps, largest = torch.cat([between, -between, codes, torch.tensor([2.0**-11])]), 448.0
    around = torch.stack([steps, steps.nextafter(torch.tensor(1e9)), steps.nextafter(torch.tensor(-1e9))])
    rows = torch.cat([torch.full((3, 1), largest), around], 1) * torch.tensor([[1.0], [2.0**-120], [2.0**80]])
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    assert_rounded(quantize_packed(rows, FORMATS["F32"]), stored, 1)


@pytest.mark.parametrize("stored", [INT8, FLOAT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inputs_of_layers(dtype: torch.dtype, stored: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(7, 1280, generator=generator)
    rows[:, ::61] *= 30
    rows[3] = 0
    rows = rows.to(dtype)
    width = 256 if stored == INT8 else 1
    with using(TORCH):
        codes, scales = rounded_tokens(rows, stored, width)
    with using(TRITON):
        # Not contiguous, as halves of a modulation are.
        found = rounded_tokens(rows.to(DEVICE).t().contiguous().t(), stored, width)
    assert found[1].shape == (7, 1)
    assert_same((found[0], found[1].view(-1)), (codes, scales.view(-1)))


@pytest.mark.parametrize("stored", [INT8, FLOAT8])
def test_what_is_not_finite_in_an_input_stays_so(stored: str) -> None:
    rows = torch.ones(3, 256)
    rows[0, 5], rows[1, 6] = torch.inf, torch.nan
    with using(TRITON):
        found = round_tokens_by_kernel(rows.to(DEVICE), stored, 1)
    assert found is not None
    results = found[0].cpu().float() * found[1].cpu().view(-1, 1)
    assert not results[:2].sum(1).isfinite().any()
    assert torch.equal(results[2], rows[2])


@pytest.mark.parametrize("stored", [INT8, FLOAT8])
def test_a_layer_multiplies_alike(stored: str) -> None:
    generator = torch.Generator().manual_seed(2)
    packed = quantize_packed(torch.randn(48, 512, generator=generator), FORMATS["Q8_0"])
    x = torch.randn(2, 20, 512, generator=generator)
    with using(TORCH):
        wanted = rounded_linear(x, round_weight(packed, stored, torch.float32))
    with using(TRITON):
        weight = round_weight(on_device(packed), stored, torch.float32)
        found = rounded_linear(x.to(DEVICE), weight).cpu()
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_what_no_kernel_takes_is_rounded_by_torch() -> None:
    odd = random_packed("int8-rows", (4, 6))  # rows that are no whole number of words
    long = quantize_packed(torch.ones(1, 32768), FORMATS["Q8_0"])
    for packed in (odd, long):
        with using(TRITON):
            assert round_weight_by_kernel(on_device(packed), FLOAT8, 1) is None
            assert not rounds_by_kernel(packed, DEVICE)
    assert round_weight(on_device(long), INT8, torch.float32).codes.shape == (1, 32768)


def test_it_pays_from_fewer_tokens_in_one_pass() -> None:
    packed = random_packed("Q4_K", (4, 256))
    with using(TRITON):
        assert rounds_by_kernel(packed, DEVICE)
    gpu = torch.device("cuda")
    assert (
        fewest_tokens(gpu, True, False)
        < fewest_tokens(gpu, False, True)
        < 1024
        < fewest_tokens(gpu, False, False)
    )


@pytest.mark.parametrize("wrong", ["", "codes", "scales"])
def test_the_first_result_is_compared_with_torch(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed = on_device(quantize_packed(torch.randn(4, 256), FORMATS["Q8_0"]))
    with using(TORCH):
        expected = exactly_rounded(packed, INT8, 256)
    launch = dispatch._launch_module()
    start, calls = launch.round_to_8_bits, []

    def changed(
        found: Any, tensors: Any, codes: torch.Tensor, scales: torch.Tensor, *more: Any, **named: Any
    ) -> None:
        start(found, tensors, codes, scales, *more, **named)
        calls.append(wrong)
        if wrong == "codes":
            codes.view(-1)[-1] += 2
        elif wrong == "scales":
            scales[-1] *= 1.01

    monkeypatch.setattr(launch, "round_to_8_bits", changed)
    monkeypatch.setattr(dispatch, "_fails", set())
    monkeypatch.setattr(dispatch, "_proven", set())
    monkeypatch.setattr(dispatch, "_torch_does", lambda device: dispatch._forced == TORCH)
    for _ in range(3):
        found = round_weight(packed, INT8, torch.float32)
        # On a GPU torch rotates by a matmul.
        assert (found.codes.short() - expected[0].short()).abs().max() <= 1
        assert torch.allclose(found.scale, expected[1], rtol=1e-5)
    assert len(calls) == (1 if wrong else 3)
    rounding = [record.getMessage() for record in caplog.records if "Q8_0" in record.getMessage()]
    assert len(rounding) == bool(wrong)
    assert not wrong or "gave another result than torch" in rounding[0]
    assert rounds_by_kernel(packed, DEVICE) == (not wrong)


def test_zeros_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_proven", set())
    monkeypatch.setattr(dispatch, "_torch_does", lambda device: dispatch._forced == TORCH)
    for values, count in ((torch.zeros(4, 256), 0), (torch.randn(4, 256), 1)):
        packed = on_device(quantize_packed(values, FORMATS["F16"]))
        assert round_weight(packed, INT8, torch.float32).codes.any() == bool(count)
        assert len(dispatch._proven) == count


def test_weights_of_8_bit_products() -> None:
    fmt = format_called("product-int8-smooth")
    encoder = format_called("product-int8-dynamic").encoder()  # type: ignore[union-attr]
    assert encoder is not None and not isinstance(fmt, type)
    packed = encode(torch.randn(5, 512), encoder)
    factor = torch.rand(512) + 0.5
    assert_rounded(
        dataclasses.replace(packed, format=fmt, parts={**packed.parts, "factor": factor}), FLOAT8, 1
    )
