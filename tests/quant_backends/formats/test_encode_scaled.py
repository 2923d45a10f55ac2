"""Encoding the libraries' formats: the same bytes as the libraries on a CPU, whatever the weights and their dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats.four_bit_encoder import VALUES, SearchedFourBitEncoder, dynamic_map
from snug.quant_backends.formats.roundings import OWN, QUANTO, TORCHAO, TORCHAO_ASYMMETRIC, Rounding
from snug.quant_backends.formats.row_encoder import ElementEncoder
from snug.quant_backends.formats.scaled import BitsAndBytes4Bit, ScaledElements, ScaledFormat, scaled_format
from snug.quant_backends.kernels import dequantize as kernel
from snug.quant_backends.kernels.dequantize import dequantize_packed, encode, quantize_packed
from snug.quant_backends.registry import bitsandbytes, int8, quanto, torchao

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[None, 512], ids=["one chunk", "many chunks"], autouse=True)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(kernel, "weights_per_chunk", lambda device: request.param)


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Like a layer's, with rows of zeros, of one number, of tiny and huge ones, and channels that stand out."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) / 30
    values[:, :: max(1, columns // 3)] *= 20
    values[1] = 0
    values[2] = 0.0325
    values[3] *= 1e-4
    values[4] *= 300
    values[5] = values[5].abs()
    values[6, columns // 2 :] = 0
    return values.to(dtype)


def same(found: PackedTensor, expected: PackedTensor) -> None:
    assert found.parts.keys() == expected.parts.keys()
    for what, ours, theirs in (
        ("data", found.data, expected.data),
        *((name, part, expected.parts[name]) for name, part in found.parts.items()),
    ):
        assert ours.dtype == theirs.dtype, what
        ours, theirs = ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)
        assert ours.numel() == theirs.numel(), what
        assert torch.equal(ours, theirs), (what, (ours != theirs).sum(), ours.numel())


def without_nan(packed: PackedTensor) -> PackedTensor:
    """Some libraries divide zero by zero in rows of zeros, which become NaN in float8; Snug stores 0."""
    nan = packed.data.float().isnan()
    assert nan[1].all(), "the library has changed: compare with it as it is"
    return PackedTensor(
        torch.where(nan, 0, packed.data.float()).to(packed.data.dtype),
        packed.format,
        packed.shape,
        packed.parts,
    )


def with_rounding(rounding: Rounding, values: torch.Tensor, fmt: ScaledFormat) -> PackedTensor:
    assert isinstance(fmt, ScaledElements)
    return encode(values, ElementEncoder(fmt, rounding))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", ["", "-nested-256"])
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind: str, block: int, nested: str, dtype: torch.dtype) -> None:
    fmt = scaled_format(f"bnb-{kind}-{block}{nested}")
    for shape in ((64, 256), (33, 100), (9, 31), (40, 640)):
        values = weights(*shape, dtype)
        same(quantize_packed(values, fmt), bitsandbytes.BitsAndBytes.quantize(values, fmt))


def test_bitsandbytes_maps_are_the_librarys() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(torch.device("cpu")), functional.create_dynamic_map())
    for kind, values in VALUES.items():
        assert torch.equal(torch.tensor(values), functional.get_4bit_type(kind, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_int8(dtype: torch.dtype) -> None:
    fmt = scaled_format("int8-rows-scb")
    values = weights(40, 300, dtype)
    same(quantize_packed(values, fmt), bitsandbytes.BitsAndBytes.quantize(values, fmt))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8-rows", "float8_e4m3fn-rows", "float8_e5m2-rows"])
def test_quanto_8bit(name: str, dtype: torch.dtype) -> None:
    fmt = scaled_format(name)
    values = weights(40, 300, dtype)
    ours, theirs = with_rounding(QUANTO, values, fmt), quanto.Quanto.quantize(values, fmt)
    same(ours, without_nan(theirs) if "float8" in name else theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "shape", "group"),
    [(4, (40, 256), 128), (2, (40, 256), 128), (4, (9, 96), 96), (2, (11, 64), 32)],
)
def test_quanto_groups(bits: int, shape: tuple[int, int], group: int, dtype: torch.dtype) -> None:
    fmt = scaled_format(f"quanto-int{bits}-{group}")
    values = weights(*shape, dtype)
    same(quantize_packed(values, fmt), quanto.Quanto.quantize(values, fmt))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    ["int8-rows-zero", "int8-1x128-zero", "int8-tensor-zero", "int8-1x32", "float8_e4m3fn-rows"]
    + ["float8_e4m3fn-tensor", "float8_e5m2-rows"],
)
def test_torchao(name: str, dtype: torch.dtype) -> None:
    fmt = scaled_format(name)
    values = weights(40, 256, dtype)
    ours, theirs = with_rounding(TORCHAO, values, fmt), torchao.TorchAO.quantize(values, fmt)
    same(ours, without_nan(theirs) if name.startswith("float8") and "rows" in name else theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 128])
def test_torchao_asymmetric(group: int, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    fmt = scaled_format(f"int8-1x{group}-zero")
    values = weights(40, 256, dtype)
    layer: Any = torch.nn.Linear(256, 40, bias=False, dtype=dtype)
    layer.weight = torch.nn.Parameter(values.clone(), requires_grad=False)
    config = quantization.IntxWeightOnlyConfig(
        granularity=quantization.PerGroup(group), mapping_type=primitives.MappingType.ASYMMETRIC
    )
    quantization.quantize_(layer, config)
    found: Any = layer.weight
    theirs = PackedTensor(found.qdata, fmt, (40, 256), {"scale": found.scale, "zero": found.zero_point})
    same(with_rounding(TORCHAO_ASYMMETRIC, values, fmt), theirs)


@pytest.mark.parametrize("name", ["int8-rows", "int8-tensor", "int8-rows-rotated-64"])
def test_own_int8_is_comfy_kitchens_in_float32(name: str) -> None:
    fmt = scaled_format(name)
    values = weights(40, 256, torch.float32)
    ours, theirs = quantize_packed(values, fmt), int8.INT8.quantize(values, fmt)
    if "rotated" not in name:
        theirs.parts["scale"].clamp_(min=torch.finfo(torch.float32).tiny)
        keep = torch.arange(40) != 1  # its scale of a row of zeros is another tiny number
        assert torch.equal(ours.data, theirs.data)
        scales = [packed.parts["scale"].expand(40, 1)[keep] for packed in (ours, theirs)]
        assert torch.equal(*scales)
        return
    # It rotates by a matrix product, whose sums have another order.
    assert ((ours.data.int() - theirs.data.int()).abs() <= 1).all()
    assert (ours.data != theirs.data).float().mean() < 0.01
    assert torch.allclose(dequantize_packed(ours), dequantize_packed(theirs), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("name", ["float8_e4m3fn-tensor", "float8_e5m2-tensor"])
def test_scaled_float8_uses_the_whole_range(name: str) -> None:
    values = weights(40, 256, torch.bfloat16)
    fmt = scaled_format(name)
    assert isinstance(fmt, ScaledElements)
    packed = encode(values, ElementEncoder(fmt, OWN))
    largest = torch.finfo(fmt.data_dtype).max
    assert packed.data.float().abs().max() == largest and packed.parts["scale"].numel() == 1
    assert packed.parts["scale"] == values.float().abs().max() / largest


@pytest.mark.parametrize("shape", [(64, 256), (33, 100), (9, 31)])
def test_searched_scales_beat_the_librarys(shape: tuple[int, int]) -> None:
    """In each block, in the sum that importance gives; blocks of zeros stay zeros."""
    fmt = scaled_format("bnb-nf4-64")
    assert isinstance(fmt, BitsAndBytes4Bit)
    values = weights(*shape, torch.float32)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(7)) ** 4
    plain = dequantize_packed(quantize_packed(values, fmt)) - values
    searched = dequantize_packed(encode(values, SearchedFourBitEncoder(fmt))) - values
    weighted = dequantize_packed(encode(values, SearchedFourBitEncoder(fmt), importance)) - values
    assert searched.square().sum() < plain.square().sum()
    assert (weighted.square() * importance).sum() < (searched.square() * importance).sum()
    if shape[1] % 64 == 0:
        assert not (searched + values)[1].any()
        per_block = [error.view(-1, 64).square().sum(1) for error in (searched, plain)]
        assert (per_block[0] <= per_block[1] * 1.0001 + 1e-12).all()


def test_searched_scales_are_much_better_for_usual_weights() -> None:
    fmt = scaled_format("bnb-nf4-64")
    assert isinstance(fmt, BitsAndBytes4Bit)
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(8)) / 30
    plain = dequantize_packed(quantize_packed(values, fmt)) - values
    searched = dequantize_packed(encode(values, SearchedFourBitEncoder(fmt))) - values
    assert searched.norm() < 0.95 * plain.norm()


@pytest.mark.parametrize("name", ["int8-1x32", "quanto-int4-32", "int8-rows-rotated-16"])
def test_rows_that_are_no_whole_groups(name: str) -> None:
    with pytest.raises(SnugError, match=rf"Rows of 40 weights are no whole groups of \d+ as {name} has them"):
        quantize_packed(torch.zeros(4, 40), scaled_format(name))


@pytest.mark.parametrize(
    "name", ["bnb-nf4-64-nested-256", "bnb-fp4-64", "quanto-int4-32", "int8-rows", "int8-rows-scb"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_do_not_stop_it(name: str, value: float) -> None:
    """Their block, or with double quantization the weight, is broken then, as it was before; the others are not."""
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(9))
    values[1, 5] = value
    found = dequantize_packed(quantize_packed(values, scaled_format(name)))
    assert not found[1].isfinite().all()
    if "nested" not in name:
        assert (found[2] - values[2]).norm() < 0.3 * values[2].norm()
