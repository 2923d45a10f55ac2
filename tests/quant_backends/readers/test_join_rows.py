"""Joined and cut rows decode to the rows of the parts, bit for bit, for the packings of every library."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.formats.scaled import scaled_format
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed
from snug.quant_backends.readers.join_rows import Value, join_rows, rows, swap_halves

Make = Callable[[int, int], PackedTensor]


def values(count: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * 1000 + columns)
    return (torch.randn(count, columns, generator=generator) * (1 + count % 5)).to(dtype)


def ggml(name: str) -> Make:
    def make(count: int, columns: int) -> PackedTensor:
        gguf = pytest.importorskip("gguf", reason="gguf is not installed")
        kind = gguf.GGMLQuantizationType[name]
        data = gguf.quantize(values(count, columns).numpy(), kind)
        return PackedTensor(
            torch.from_numpy(np.ascontiguousarray(data)).view(-1), FORMATS[name], (count, columns)
        )

    return make


def bitsandbytes_4bit(kind: str, block: int, nested: bool) -> Make:
    def make(count: int, columns: int) -> PackedTensor:
        functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
        data, state = functional.quantize_4bit(
            values(count, columns).half(), quant_type=kind, blocksize=block, compress_statistics=nested
        )
        parts = {"absmax": state.absmax, "quant_map": state.code}
        if nested:
            parts["nested_absmax"], parts["nested_quant_map"] = state.state2.absmax, state.state2.code
            parts["nested_offset"] = state.offset.view(1)
        name = f"bnb-{kind}-{block}" + (f"-nested-{state.state2.blocksize}" if nested else "")
        return PackedTensor(data, scaled_format(name), (count, columns), parts)

    return make


def bitsandbytes_int8(count: int, columns: int) -> PackedTensor:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    data, scale, _ = functional.int8_vectorwise_quant(values(count, columns).half())
    return PackedTensor(data, scaled_format("int8-rows-scb"), (count, columns), {"scale": scale})


def quanto(kind: str, dtype: torch.dtype) -> Make:
    def make(count: int, columns: int) -> PackedTensor:
        library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        layer = torch.nn.Sequential(torch.nn.Linear(columns, count, bias=False))
        layer[0].weight = torch.nn.Parameter(values(count, columns, dtype))
        library.quantize(layer, weights=library.qtypes[kind])
        library.freeze(layer)
        state = layer.state_dict()
        scale, shift = state["0.weight._scale"], state.get("0.weight._shift")
        if shift is None:
            data = state["0.weight._data"]
            name = f"{str(data.dtype).removeprefix('torch.')}-{'rows' if scale.numel() > 1 else 'tensor'}"
            return PackedTensor(data, scaled_format(name), (count, columns), {"scale": scale})
        data = state["0.weight._data._data"]
        fmt = scaled_format(f"quanto-{kind[1:]}-{data.shape[1]}")
        return PackedTensor(data, fmt, (count, columns), {"scale": scale, "shift": shift})

    return make


def torchao(config: str, granularity: Callable[[Any], Any], zero: bool = False) -> Make:
    def make(count: int, columns: int) -> PackedTensor:
        library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        layer = torch.nn.Linear(columns, count, bias=False)
        layer.weight = torch.nn.Parameter(values(count, columns))
        options = {"weight_dtype": vars(torch)["int4"]} if zero else {"set_inductor_config": False}
        options |= {"granularity": granularity(library)} if granularity(library) else {}
        library.quantize_(layer, getattr(library, config)(**options))
        weight: Any = layer.weight
        block = [min(size, most) for size, most in zip(weight.block_size, weight.shape, strict=True)]
        kind = "rows" if block == [1, columns] else f"{block[0]}x{block[1]}"
        fmt = scaled_format(
            f"{str(weight.qdata.dtype).removeprefix('torch.')}-{kind}{'-zero' if zero else ''}"
        )
        parts = {"scale": weight.scale} | ({"zero": weight.zero_point} if zero else {})
        return PackedTensor(weight.qdata, fmt, (count, columns), parts)

    return make


def scaled_fp8(block: str) -> Make:
    def make(count: int, columns: int) -> PackedTensor:
        fmt = scaled_format(f"float8_e4m3fn-{block}")
        down, across = (int(size) for size in block.split("x")) if "x" in block else (0, 0)
        grid = (-(-count // down) if down else 1, -(-columns // across) if across else 1)
        scale = torch.rand(grid, generator=torch.Generator().manual_seed(count)) + 0.5
        return PackedTensor(
            values(count, columns).to(torch.float8_e4m3fn), fmt, (count, columns), {"scale": scale}
        )

    return make


def product(name: str) -> Make:
    return lambda count, columns: quantize_packed(values(count, columns), scaled_format(f"product-{name}"))


# What makes a packed weight, and columns with which its blocks end with the rows (quanto fails with a single group).
PACKINGS: dict[str, tuple[Make, int]] = {
    "Q4_0": (ggml("Q4_0"), 96),
    "Q8_0": (ggml("Q8_0"), 32),
    "nf4": (bitsandbytes_4bit("nf4", 64, False), 128),
    "nf4-nested": (bitsandbytes_4bit("nf4", 64, True), 64),
    "fp4": (bitsandbytes_4bit("fp4", 128, False), 256),
    "bnb-int8": (bitsandbytes_int8, 33),
    "qint8": (quanto("qint8", torch.float32), 40),
    "qfloat8": (quanto("qfloat8", torch.float16), 40),
    "qint4": (quanto("qint4", torch.float16), 256),
    "qint4-bf16": (quanto("qint4", torch.bfloat16), 192),
    "qint2": (quanto("qint2", torch.float32), 256),
    "torchao-int8": (torchao("Int8WeightOnlyConfig", lambda ao: None), 48),
    "torchao-int8-groups": (torchao("Int8WeightOnlyConfig", lambda ao: ao.PerGroup(16)), 48),
    "torchao-int4": (torchao("IntxWeightOnlyConfig", lambda ao: ao.PerGroup(16), zero=True), 48),
    "torchao-float8": (torchao("Float8WeightOnlyConfig", lambda ao: None), 48),
    "fp8": (scaled_fp8("tensor"), 24),
    "fp8-blocks": (scaled_fp8("4x16"), 40),
    "int8-dynamic": (product("int8-dynamic"), 40),
    "llm-int8": (product("int8-scb-6"), 40),
}


def decoded(value: Value, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dequantize_packed(value, dtype) if isinstance(value, PackedTensor) else value.to(dtype)


@pytest.mark.parametrize("counts", [(4, 4, 4), (1, 1), (3, 5, 1, 7), (8,)], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_joined_parts_decode_as_before_and_stay_packed(packing: str, counts: tuple[int, ...]) -> None:
    make, columns = PACKINGS[packing]
    parts = [make(count, columns) for count in counts]
    joined = join_rows(parts)
    assert isinstance(joined, PackedTensor)
    assert joined.shape == (sum(counts), columns)
    assert torch.equal(decoded(joined), torch.cat([decoded(part) for part in parts]))
    # Scales repeated for each row are the most that staying packed may cost (blocks of 4 x 16 at odd rows).
    assert joined.nbytes <= sum(part.nbytes for part in parts) + joined.shape[0] * 16


@pytest.mark.parametrize("cut", [(0, 4), (4, 12), (0, 12), (5, 6), (3, 10), (11, 12), (6, 6)], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_the_rows(packing: str, cut: tuple[int, int]) -> None:
    make, columns = PACKINGS[packing]
    packed = make(12, columns)
    found = rows(packed, *cut)
    assert isinstance(found, PackedTensor)
    assert torch.equal(decoded(found), decoded(packed)[cut[0] : cut[1]])


@pytest.mark.parametrize("count", [2, 6, 10])
@pytest.mark.parametrize("packing", PACKINGS)
def test_swapped_halves(packing: str, count: int) -> None:
    make, columns = PACKINGS[packing]
    packed = make(count, columns)
    swapped = swap_halves(packed)
    assert isinstance(swapped, PackedTensor)
    upper, lower = decoded(packed).chunk(2)
    assert torch.equal(decoded(swapped), torch.cat([lower, upper]))
    assert torch.equal(decoded(swap_halves(swapped)), decoded(packed))


CROSSING = [("nf4", 40), ("nf4-nested", 100), ("fp4", 33)]


@pytest.mark.parametrize(("packing", "columns"), CROSSING)
def test_blocks_that_cross_the_parts_are_decoded(packing: str, columns: int) -> None:
    """bitsandbytes' blocks do not end with the row: 3 rows of 40 are one block and most of another."""
    make, _ = PACKINGS[packing]
    parts = [make(3, columns), make(5, columns)]
    joined = join_rows(parts)
    assert isinstance(joined, torch.Tensor) and joined.dtype == torch.float16
    assert torch.equal(joined, torch.cat([decoded(part, torch.float16) for part in parts]))
    found = rows(parts[1], 1, 3)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, decoded(parts[1], torch.float16)[1:3])
    pair = make(6, columns)
    assert torch.equal(decoded(swap_halves(pair), torch.float16), decoded(pair, torch.float16).roll(3, 0))


MIXED = [*itertools.combinations(("Q4_0", "nf4", "fp8", "qint8", "bnb-int8"), 2)]


@pytest.mark.parametrize(("first", "second"), MIXED)
def test_mixed_formats_become_float16(first: str, second: str) -> None:
    parts = [PACKINGS[first][0](3, 128), PACKINGS[second][0](2, 128)]
    if {first, second} == {"fp8", "qint8"}:
        parts[0] = PACKINGS["fp8-blocks"][0](4, 128)
    joined = join_rows(parts)
    assert isinstance(joined, torch.Tensor) and joined.dtype == torch.float16
    assert torch.equal(joined, torch.cat([decoded(part, torch.float16) for part in parts]))


def test_products_with_a_scale_for_all_are_cut_but_not_joined() -> None:
    packed = quantize_packed(values(12, 40), scaled_format("product-float8_e4m3fn-dynamic"))
    cut = rows(packed, 3, 9)
    assert isinstance(cut, PackedTensor) and torch.equal(decoded(cut), decoded(packed)[3:9])
    assert isinstance(join_rows([cut, packed]), torch.Tensor)


def elements(scale: torch.Tensor, block: str = "tensor") -> PackedTensor:
    data = torch.arange(-64, 64, dtype=torch.int8).view(4, 32)
    return PackedTensor(data, scaled_format(f"int8-{block}"), (4, 32), {"scale": scale})


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("second", "dtype"),
    [
        (torch.ones(2, 32, dtype=BF16), BF16),
        (torch.ones(2, 32, dtype=F16), F16),
        (torch.ones(2, 32), F32),
        (torch.ones(2, 32).to(torch.float8_e4m3fn), F16),
        (elements(torch.rand(2, 4).to(BF16), "2x8"), BF16),
    ],
    ids=["bf16", "f16", "f32", "f8", "bf16 scales"],
)
def test_the_dense_dtype_is_the_one_that_the_parts_ask_for(second: Value, dtype: torch.dtype) -> None:
    first = PACKINGS["nf4"][0](2, 32)
    joined = join_rows([first, second])
    assert isinstance(joined, torch.Tensor) and joined.dtype == dtype
    assert torch.equal(joined, torch.cat([decoded(first, dtype), decoded(second, dtype)]))


def test_parts_that_disagree_about_their_dtype_lose_nothing() -> None:
    parts = [torch.randn(2, 8).to(BF16), torch.randn(1, 8).to(F16)]
    joined = join_rows(parts)
    assert isinstance(joined, torch.Tensor) and joined.dtype == F32
    assert torch.equal(joined, torch.cat([part.float() for part in parts]))


@pytest.mark.parametrize("scale", [1e4, 1e-7])
def test_weights_outside_the_range_of_float16_become_float32(scale: float) -> None:
    parts = [elements(torch.tensor([scale])), PACKINGS["nf4"][0](2, 32)]
    joined = join_rows(parts)
    assert isinstance(joined, torch.Tensor) and joined.dtype == F32
    assert torch.equal(joined, torch.cat([decoded(part) for part in parts]))


def test_zeros_are_in_the_range_of_float16() -> None:
    joined = join_rows([elements(torch.zeros(1)), PACKINGS["nf4"][0](2, 32)])
    assert isinstance(joined, torch.Tensor) and joined.dtype == F16


def test_a_scale_for_the_tensor_becomes_one_for_each_row() -> None:
    tensor, by_row = elements(torch.tensor(0.25)), elements(torch.rand(4, 1).to(BF16), "rows")
    for parts in ([tensor, by_row], [by_row, tensor], [tensor, tensor]):
        joined = join_rows(parts)
        assert isinstance(joined, PackedTensor) and joined.format.name == "int8-rows"
        assert torch.equal(decoded(joined), torch.cat([decoded(part) for part in parts]))


def test_zero_points_of_different_dtypes() -> None:
    def make(zero: torch.Tensor) -> PackedTensor:
        data = torch.arange(64, dtype=torch.uint8).view(2, 32)
        return PackedTensor(
            data, scaled_format("uint8-rows-zero"), (2, 32), {"scale": torch.rand(2), "zero": zero}
        )

    parts = [make(torch.tensor([7, 1 << 20], dtype=torch.int32)), make(torch.tensor([0.5, 0.25], dtype=BF16))]
    joined = join_rows(parts)
    assert isinstance(joined, PackedTensor)
    assert torch.equal(decoded(joined), torch.cat([decoded(part) for part in parts]))


def test_quanto_shifts_of_both_kinds_are_not_mixed() -> None:
    """Integer shifts are subtracted before scaling, float ones after it."""
    packed = PACKINGS["qint4"][0](4, 128)
    shift = torch.randint(-8, 8, packed.parts["scale"].shape, dtype=torch.int8)
    other = PackedTensor(packed.data, packed.format, packed.shape, {**packed.parts, "shift": shift})
    joined = join_rows([packed, other])
    assert isinstance(joined, torch.Tensor)
    assert torch.equal(joined, torch.cat([decoded(packed, F16), decoded(other, F16)]))
    same = join_rows([other, other])
    assert isinstance(same, PackedTensor)
    assert torch.equal(decoded(same), torch.cat([decoded(other)] * 2))


@pytest.mark.parametrize("dtype", [F32, F16, BF16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_tensors(dtype: torch.dtype) -> None:
    parts = [values(count, 6).to(dtype) for count in (3, 1)]
    joined = join_rows(parts)
    assert isinstance(joined, torch.Tensor) and joined.dtype == dtype
    assert torch.equal(joined.float(), torch.cat([part.float() for part in parts]))
    biases = [part[0] for part in parts]
    assert torch.equal(decoded(join_rows(biases)), torch.cat([bias.float() for bias in biases]))
    swapped = swap_halves(values(4, 6).to(dtype))
    assert torch.equal(decoded(swapped), values(4, 6).to(dtype).float().roll(2, 0))


def test_vectors_of_scaled_formats_are_decoded() -> None:
    def vector(scale: float) -> PackedTensor:
        data = torch.arange(-4, 4, dtype=torch.int8)
        return PackedTensor(data, scaled_format("int8-rows"), (8,), {"scale": torch.tensor([scale])})

    parts = [vector(0.5), vector(2.0)]
    joined = join_rows(parts)
    assert isinstance(joined, torch.Tensor)
    assert torch.equal(joined.float(), torch.cat([decoded(part) for part in parts]))


def test_what_cannot_be_joined() -> None:
    with pytest.raises(
        SnugError, match=r"shapes \(2, 3\), \(2, 4\) cannot be joined by rows: their columns differ"
    ):
        join_rows([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(SnugError, match="columns differ"):
        join_rows([torch.ones(()), torch.ones(())])
    with pytest.raises(SnugError, match=r"shape \(3, 2\) does not have two halves"):
        swap_halves(torch.ones(3, 2))
    with pytest.raises(SnugError, match="whole numbers"):
        join_rows([torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2)])
