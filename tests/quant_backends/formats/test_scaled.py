"""Scaled formats against the libraries that write them, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats.scaled import scaled_format
from snug.quant_backends.kernels import dequantize as kernel
from snug.quant_backends.kernels.dequantize import dequantize_packed

NAMES = [
    "bnb-nf4-64",
    "bnb-fp4-4096-nested-256",
    "int8-rows",
    "int8-rows-scb",
    "float8_e4m3fn-tensor",
    "float8_e5m2-128x128",
    "int8-1x32-zero",
    "quanto-int4-128",
    "quanto-int2-64",
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONE = {"scale": torch.ones(1)}


@pytest.fixture(params=[None, 100], ids=["one chunk", "many chunks"], autouse=True)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(kernel, "weights_per_chunk", lambda device: request.param)


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    values.view(-1)[: values.numel() // 3] = 0  # whole blocks of zeros
    return values.to(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_everything(name: str) -> None:
    fmt = scaled_format(name)
    assert fmt.name == name
    assert scaled_format(name) is fmt
    assert hash(fmt) == hash(type(fmt).parse(name))


@pytest.mark.parametrize(
    "name", ["", "bnb-nf4", "bnb-nf4-0", "int8-rows-zero-scb", "int4-rows", "quanto-int3-64"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(SnugError, match="no scaled format called"):
        scaled_format(name)


def bitsandbytes_4bit(values: torch.Tensor, kind: str, block: int, nested: bool) -> tuple[PackedTensor, Any]:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    data, state = functional.quantize_4bit(
        values, quant_type=kind, blocksize=block, compress_statistics=nested
    )
    parts = {"absmax": state.absmax, "quant_map": state.code}
    name = f"bnb-{kind}-{block}"
    if nested:
        name += f"-nested-{state.state2.blocksize}"
        parts |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
        parts["nested_offset"] = state.offset.view(1)
    packed = PackedTensor(data, scaled_format(name), tuple(values.shape), parts)
    # Blocks cross rows, which the library's code for AVX-512 overlooks: one row has none to cross.
    state.shape = torch.Size((1, values.numel()))
    return packed, lambda: functional.dequantize_4bit(data, state).view(values.shape)


@pytest.mark.parametrize("shape", [(6, 64), (5, 96), (3, 130), (1, 8200), (7, 9), (2, 3)], ids=str)
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind: str, nested: bool, block: int, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        packed, reference = bitsandbytes_4bit(weights(*shape, dtype=dtype), kind, block, nested)
        expected = reference()
        assert torch.equal(dequantize_packed(packed, expected.dtype), expected)


def test_bitsandbytes_int8() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    data, scale, _ = functional.int8_vectorwise_quant(weights(9, 50, dtype=torch.float16))
    packed = PackedTensor(data, scaled_format("int8-rows-scb"), (9, 50), {"scale": scale})
    assert torch.equal(dequantize_packed(packed), functional.int8_vectorwise_dequant(data, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(6, 256), (5, 64), (1, 128), (3, 32)], ids=str)
def test_quanto_groups(bits: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    values, group = weights(*shape, dtype=dtype), 32
    qtype = quanto.qint4 if bits == 4 else quanto.qint2
    scale, shift = quanto.MaxOptimizer()(values, qtype, 0, group)
    for zero in (shift, (shift / scale).round().to(torch.int8)):
        quantized = quanto.WeightQBitsTensor.quantize(values, qtype, 0, group, scale, zero, optimized=False)
        stored = quantized._data._data
        parts = {"scale": quantized._scale, "shift": quantized._shift}
        packed = PackedTensor(stored, scaled_format(f"quanto-int{bits}-{group}"), shape, parts)
        assert torch.equal(dequantize_packed(packed, dtype), quantized.dequantize())


@pytest.mark.parametrize("stored", ["int8", "uint8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("block", ["tensor", "rows", "1x32", "4x32", "3x7", "128x128"])
@pytest.mark.parametrize("zero", [False, True])
def test_scaled_elements(stored: str, block: str, zero: bool) -> None:
    shape, generator = (10, 96), torch.Generator().manual_seed(1)
    high, wide = {"tensor": (10, 96), "rows": (1, 96)}.get(block) or map(int, block.split("x"))
    grid = (-(-shape[0] // high), -(-shape[1] // wide))
    data = torch.randint(0, 120, shape, generator=generator).to(getattr(torch, stored))
    parts = {"scale": torch.rand(grid, generator=generator)}
    expected = data.float()
    if zero:
        parts["zero"] = torch.randint(0, 16, grid, generator=generator, dtype=torch.int8)
        expected = expected - spread(parts["zero"].float(), high, wide)
    expected = expected * spread(parts["scale"], high, wide)
    name = f"{stored}-{block}{'-zero' if zero else ''}"
    packed = PackedTensor(data, scaled_format(name), shape, parts)
    for dtype in DTYPES:
        assert torch.equal(dequantize_packed(packed, dtype), expected.to(dtype))


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_every_float8_number(stored: str) -> None:
    dtype = getattr(torch, stored)
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[every.view(dtype).float().isfinite()]
    for codes in (every, finite):
        # at the start of its memory and one byte later
        for data in (codes, torch.cat([codes[:1], codes])[1:]):
            packed = PackedTensor(data.view(dtype), scaled_format(f"{stored}-tensor"), data.shape, ONE)
            found, expected = dequantize_packed(packed), data.view(dtype).float()
            assert torch.equal(found.isnan(), expected.isnan())
            same = found.view(torch.int32) == expected.view(torch.int32)  # signs of zeros as well
            assert (same | expected.isnan()).all()


def test_outputs_at_odd_places() -> None:
    packed, reference = bitsandbytes_4bit(weights(3, 64), "nf4", 64, nested=False)
    out = torch.empty(3 * 64 + 1)[1:].view(3, 64)
    assert torch.equal(dequantize_packed(packed, out=out), reference())


def spread(numbers: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    return numbers.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:10, :96]


def parts_of(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Data and parts of a tensor of shape (4, 128)."""
    if name.startswith("bnb"):
        parts = {"absmax": torch.ones(8), "quant_map": torch.ones(16)}
        return torch.zeros(256, dtype=torch.uint8), parts
    if name.startswith("quanto"):
        return torch.zeros(2, 128, dtype=torch.uint8), {"scale": torch.ones(4, 1), "shift": torch.ones(4, 1)}
    return torch.zeros(4, 128, dtype=torch.int8), {"scale": torch.ones(4)}


def faults() -> Iterator[Any]:
    def cut(data: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return data.view(-1)[:-1].clone()

    def retype(data: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return data.to(torch.int16)

    def drop(data: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        parts.pop(min(parts))
        return data

    def shorten(data: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        parts[min(parts)] = torch.ones(3)
        return data

    def stride(data: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack((data.view(-1), data.view(-1)), 1)[:, 0]

    sentences = (
        "needs 2?5[61]2? elements of",
        "elements of u?int8 as its data",
        "needs the parts",
        "got 3 of",
        "strided",
    )
    for name in ("bnb-nf4-64", "int8-rows", "quanto-int4-128"):
        for fault, sentence in zip((cut, retype, drop, shorten, stride), sentences, strict=True):
            yield pytest.param(name, fault, sentence, id=f"{name}-{fault.__name__}")


@pytest.mark.parametrize(("name", "fault", "sentence"), list(faults()))
def test_tensors_that_do_not_fit_are_refused(name: str, fault: Callable[..., Any], sentence: str) -> None:
    data, parts = parts_of(name)
    PackedTensor(data, scaled_format(name), (4, 128), parts)
    data = fault(data, parts)
    with pytest.raises(SnugError, match=sentence):
        PackedTensor(data, scaled_format(name), (4, 128), parts)


@pytest.mark.parametrize("name", ["bnb-nf4-64", "int8-rows", "quanto-int4-128"])
def test_size_and_outputs(name: str) -> None:
    data, parts = parts_of(name)
    packed = PackedTensor(data, scaled_format(name), (4, 128), parts)
    assert packed.nbytes == data.nbytes + sum(part.nbytes for part in parts.values())
    out = torch.empty(4, 128, dtype=torch.bfloat16)
    assert dequantize_packed(packed, torch.bfloat16, out) is out
    with pytest.raises(SnugError, match="output must be a contiguous"):
        dequantize_packed(packed, torch.float32, out)
    away = {key: part.to("meta") for key, part in parts.items()}
    stand_in = PackedTensor(data.to("meta"), packed.format, (4, 128), away)
    assert dequantize_packed(stand_in, torch.float16).device.type == "meta"
