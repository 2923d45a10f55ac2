"""Triton's kernels decode every format to the same bits as torch, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_device import DEVICE, needs_kernels, on_device
from random_packed import random_packed
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS, Format
from snug.quant_backends.formats.scaled import format_called
from snug.quant_backends.kernels import dispatch
from snug.quant_backends.kernels.dequantize import dequantize, dequantize_packed, encode, quantize_packed
from snug.quant_backends.kernels.dispatch import TORCH, TRITON, using
from snug.quant_backends.kernels.linear import linear

pytestmark = needs_kernels
PACKED = [fmt for fmt in FORMATS.values() if fmt.dtype is None]
every_ggml_format = pytest.mark.parametrize("fmt", PACKED, ids=lambda fmt: fmt.name)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Halves at the edges, as little-endian bytes: zeros, subnormals, largest, infinities, NaN.
EDGES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01)
SCALED = [
    "bnb-nf4-64",
    "bnb-fp4-128",
    "bnb-nf4-4096",
    "bnb-nf4-64-nested-256",
    "bnb-fp4-64-nested-4",
    "int8-rows",
    "int8-rows-scb",
    "int8-tensor",
    "int8-1x32-zero",
    "int8-2x8-zero",
    "uint8-1x64-zero",
    "float8_e4m3fn-tensor",
    "float8_e4m3fn-128x128",
    "float8_e5m2-rows",
    "float8_e4m3fnuz-rows",
    "float8_e5m2fnuz-tensor",
    "quanto-int4-128",
    "quanto-int4-12",
    "quanto-int2-64",
    "int8-rows-rotated-4",
    "int8-rows-rotated-64",
    "int8-rows-rotated-256",
]


def bits(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values.isnan(), torch.nan, values).cpu().view(torch.uint8)


def assert_same(packed: PackedTensor, dtype: torch.dtype) -> None:
    with using(TORCH):
        expected = dequantize_packed(packed, dtype)
    with using(TRITON):
        found = dequantize_packed(on_device(packed), dtype)
    assert found.shape == expected.shape
    assert torch.equal(bits(found), bits(expected))


def edge_blocks(fmt: type[Format], others: int) -> torch.Tensor:
    """Blocks of zeros, of 0xFF, of each edge, and random ones: whatever is a scale takes each edge once."""
    pairs = torch.tensor(EDGES, dtype=torch.int32).to(torch.int16).view(torch.uint8).view(-1, 2)
    edges = pairs.repeat(1, fmt.block_bytes)[:, : fmt.block_bytes]
    constant = torch.tensor([[0], [255]], dtype=torch.uint8).expand(2, fmt.block_bytes)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (others, fmt.block_bytes), dtype=torch.uint8, generator=generator)
    # Every scale byte of the formats without float16 scales, too.
    every = torch.arange(256, dtype=torch.uint8).view(-1, 1).expand(-1, fmt.block_bytes)
    rest = every if fmt.name in ("MXFP4", "NVFP4") else drawn[:0]
    return torch.cat([constant, edges, drawn, rest])


@every_ggml_format
def test_every_bit_of_ggml_formats(fmt: type[Format]) -> None:
    # One tile and a part of another.
    blocks = edge_blocks(fmt, 4096 // fmt.block_size - 8)
    packed = PackedTensor(blocks.view(-1), fmt, (len(blocks), fmt.block_size))
    for dtype in DTYPES:
        assert_same(packed, dtype)


@every_ggml_format
def test_bytes_at_any_offset(fmt: type[Format]) -> None:
    blocks = random_packed(fmt.name, (3, fmt.block_size)).data
    with using(TORCH):
        expected = bits(dequantize(blocks, fmt, (3, fmt.block_size)))
    for offset in (1, 2, 4):
        file = torch.zeros(offset + blocks.numel(), dtype=torch.uint8, device=DEVICE)
        file[offset:] = blocks
        with using(TRITON):
            found = dequantize(file[offset:], fmt, (3, fmt.block_size))
        assert torch.equal(bits(found), expected)


@pytest.mark.parametrize("name", SCALED)
def test_every_bit_of_scaled_formats(name: str) -> None:
    # Odd numbers of rows, more columns than a tile has, no whole number of blocks where that may be.
    columns = 1284 if "-12" in name and "quanto" not in name else 1536
    for rows, dtype, scale_dtype in (
        (1, torch.float32, torch.float32),
        (7, torch.bfloat16, torch.bfloat16),
        (5, torch.bfloat16, torch.float32),
        (3, torch.float16, torch.float16),
    ):
        assert_same(random_packed(name, (rows, columns), scale_dtype), dtype)


@pytest.mark.parametrize("name", ["bnb-nf4-64", "bnb-nf4-64-nested-256", "Q8_0", "Q4_K"])
def test_blocks_that_cross_rows(name: str) -> None:
    assert_same(dataclasses.replace(random_packed(name, (9, 256)), shape=(4, 64, 3, 3)), torch.bfloat16)


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_every_float8_number(stored: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(1, 256)
    fmt = format_called(f"{stored}-tensor")
    scale = torch.tensor([0.75])
    packed = PackedTensor(data.view(getattr(torch, stored)), fmt, (1, 256), {"scale": scale})
    for dtype in DTYPES:
        assert_same(packed, dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float16])
def test_shifts_of_other_types(dtype: torch.dtype) -> None:
    packed = random_packed("quanto-int4-128", (5, 256))
    shift = torch.arange(10).view(-1, 1).to(dtype)
    assert_same(dataclasses.replace(packed, parts={**packed.parts, "shift": shift}), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_zero_points_of_other_types(dtype: torch.dtype) -> None:
    packed = random_packed("int8-1x32-zero", (5, 256))
    parts = {**packed.parts, "zero": packed.parts["zero"].to(dtype)}
    assert_same(dataclasses.replace(packed, parts=parts), torch.float16)


@pytest.mark.parametrize(
    "name",
    [
        "product-int8-dynamic",
        "product-int8-smooth",
        "product-int8-static",
        "product-float8_e4m3fn-dynamic",
        "product-float8_e4m3fn-static",
        "product-int8-scb-6",
    ],
)
def test_weights_of_8_bit_products(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    fmt = format_called(name)
    encoder = format_called(name.replace("smooth", "dynamic").replace("static", "dynamic")).encoder()  # type: ignore[union-attr]
    assert encoder is not None and not isinstance(fmt, type)
    packed = encode(torch.randn(9, 260, generator=generator), encoder)
    sizes = {"factor": 260, "step": 1, "shift": 1, "offset": 9}
    more = {part: torch.rand(sizes[part], generator=generator) for part in sizes if part in fmt.part_names}
    assert_same(PackedTensor(packed.data, fmt, packed.shape, {**packed.parts, **more}), torch.bfloat16)


def test_what_no_kernel_takes_is_told_when_forced() -> None:
    packed = random_packed("int8-rows", (4, 6))  # rows that are no whole number of words
    with using(TRITON), pytest.raises(SnugError, match=r"no kernel for a int8-rows weight of shape \(4, 6\)"):
        dequantize_packed(on_device(packed))


def test_a_kernel_that_fails_is_replaced_by_torch_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C compiler\nand more")

    packed = on_device(random_packed("Q4_0", (2, 64)))
    with using(TORCH):
        expected = dequantize_packed(packed)
    monkeypatch.setattr(dispatch, "_fails", set())
    # Only the interpreter would not be taken without being asked for.
    monkeypatch.setattr(dispatch, "_kernels", lambda device, dtype: dispatch._launch_module())
    monkeypatch.setattr(dispatch._launch_module(), "dequantize", fail)
    for _ in range(3):
        assert torch.equal(bits(dequantize_packed(packed)), bits(expected))
    (record,) = caplog.records
    assert "dequantize" not in record.getMessage()
    assert "kernel for Q4_0 could not be started" in record.getMessage()
    assert record.getMessage().count("no C compiler") == 1 and "and more" not in record.getMessage()


@pytest.mark.parametrize("wrong", [True, False])
def test_the_first_result_of_a_kernel_is_compared_with_torch(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    packed = on_device(quantize_packed(values, FORMATS["Q8_0"]))
    x = torch.ones(2, 64, device=DEVICE, dtype=torch.bfloat16)
    with using(TORCH):
        expected, product = dequantize_packed(packed), linear(x, packed)
    launch, calls = dispatch._launch_module(), []

    def changed(start: Callable[..., None], out_index: int) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            start(*arguments)
            calls.append(start)
            if wrong:
                arguments[out_index].view(-1)[-1] += 100

        return run

    for name, out_index in (("dequantize", 2), ("linear", 4)):
        monkeypatch.setattr(launch, name, changed(getattr(launch, name), out_index))
    monkeypatch.setattr(dispatch, "_fails", set())
    monkeypatch.setattr(dispatch, "_proven", set())
    monkeypatch.setattr(dispatch, "_torch_does", lambda device: dispatch._forced == TORCH)
    for _ in range(3):
        assert torch.equal(bits(dequantize_packed(packed)), bits(expected))
        assert torch.allclose(linear(x, packed).float(), product.float(), rtol=0.02, atol=0.02)
    messages = [record.getMessage() for record in caplog.records]
    if wrong:
        # Once each: decoding to float32, the product, and decoding to bfloat16 in its place.
        assert len(calls) == 3 and len(messages) == 3
        assert all("gave another result than torch, so torch does its work" in text for text in messages)
    else:
        assert len(calls) == 6 and not messages and len(dispatch._proven) == 2
