from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_packed import random_packed
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS, Format
from snug.quant_backends.kernels import linear as module
from snug.quant_backends.kernels.dequantize import dequantize, dequantize_packed
from snug.quant_backends.kernels.linear import linear

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
# Rounding of the result: another order of summation, and for narrow types one step of their grid.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
COLUMNS = 512  # two blocks of the widest formats
SCALED = [
    "bnb-nf4-64",
    "bnb-nf4-64-nested-256",
    "bnb-fp4-4096",
    "int8-rows-scb",
    "int8-1x32-zero",
    "float8_e4m3fn-tensor",
    "float8_e5m2-rows",
    "float8_e4m3fn-128x128",
    "quanto-int4-128",
    "quanto-int2-64",
]


@pytest.fixture(autouse=True)
def tile_rows(monkeypatch: pytest.MonkeyPatch) -> int:
    """Shrinks the tiles to 16 rows of 512 weights; returns the rows."""
    monkeypatch.setattr(module, "CPU_TILE", 16 * COLUMNS)
    return 16


def _packed(fmt: type[Format], rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """The bytes of a weight with finite values of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    if fmt.dtype is not None:
        values = torch.randn(rows, columns, generator=generator)
        return values.to(fmt.dtype).view(-1).view(torch.uint8)
    # Random bytes hold random scales, NaN and infinity among them: such blocks are drawn again.
    blocks = torch.empty(rows * columns // fmt.block_size, fmt.block_bytes, dtype=torch.uint8)
    wrong = torch.ones(len(blocks), dtype=torch.bool)
    while wrong.any():
        drawn = (int(wrong.sum()), fmt.block_bytes)
        blocks[wrong] = torch.randint(0, 256, drawn, dtype=torch.uint8, generator=generator)
        largest = fmt.dequantize_blocks(blocks).abs().amax(1)
        wrong = ~((largest > 1e-3) & (largest < 1e3))
    return blocks.view(-1)


def _assert_equals_dense(
    x: torch.Tensor,
    data: torch.Tensor,
    fmt: type[Format],
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
) -> None:
    _assert_equals_decoded(x, PackedTensor(data, fmt, shape), bias)


def _assert_equals_decoded(x: torch.Tensor, packed: PackedTensor, bias: torch.Tensor | None = None) -> None:
    """Compares with the decoded weight, relative to what each sum could be at most."""
    found = linear(x, packed, bias)
    weight = dequantize_packed(packed, x.dtype)
    expected = F.linear(x, weight, bias)
    assert found.shape == expected.shape
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    bound = F.linear(x.float().abs(), weight.float().abs(), None if bias is None else bias.float().abs())
    assert ((found.float() - expected.float()).abs() <= TOLERANCE[x.dtype] * bound).all()


@pytest.mark.usefixtures("torch_alone")
@every_format
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 48, 61])
def test_every_format_and_tile_boundary(fmt: type[Format], rows: int) -> None:
    x = torch.randn(3, COLUMNS)
    bias = torch.randn(rows)
    _assert_equals_dense(x, _packed(fmt, rows, COLUMNS), fmt, (rows, COLUMNS), bias)


@every_format
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_every_input_dtype(fmt: type[Format], dtype: torch.dtype, with_bias: bool) -> None:
    x = torch.randn(5, COLUMNS).to(dtype)
    bias = torch.randn(37).to(dtype) if with_bias else None
    data = _packed(fmt, 37, COLUMNS)
    if dtype == torch.float16:
        x *= 1e-3  # sums stay in range
    _assert_equals_dense(x, data, fmt, (37, COLUMNS), bias)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 48, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_every_kind_of_scaled_format(name: str, dtype: torch.dtype, rows: int) -> None:
    """Scales belong to the rows of a tile, to blocks that cross tiles, or to all rows."""
    packed = random_packed(name, (rows, COLUMNS))
    _assert_equals_decoded(torch.randn(3, COLUMNS).to(dtype), packed, torch.randn(rows).to(dtype))


@pytest.mark.parametrize("leading", [(), (1,), (16,), (2, 7), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_every_input_shape(name: str, leading: tuple[int, ...]) -> None:
    fmt = FORMATS[name]
    x = torch.randn(*leading, COLUMNS)
    _assert_equals_dense(x, _packed(fmt, 40, COLUMNS), fmt, (40, COLUMNS), torch.randn(40))


def test_inputs_that_are_not_contiguous() -> None:
    fmt = FORMATS["Q4_0"]
    x = torch.randn(COLUMNS, 2, 6).permute(2, 1, 0)
    _assert_equals_dense(x, _packed(fmt, 40, COLUMNS), fmt, (40, COLUMNS))


@pytest.mark.parametrize(("name", "shape"), [("Q8_0", (64, 330)), ("Q4_K", (256, 65)), ("Q6_K", (128, 322))])
def test_blocks_that_cross_rows(name: str, shape: tuple[int, int]) -> None:
    fmt = FORMATS[name]
    data = _packed(fmt, 1, shape[0] * shape[1])
    _assert_equals_dense(torch.randn(3, shape[1]), data, fmt, shape, torch.randn(shape[0]))


@every_format
def test_bytes_at_any_offset_of_a_file(fmt: type[Format]) -> None:
    data = _packed(fmt, 33, COLUMNS)
    x = torch.randn(2, COLUMNS)
    for offset in (1, 2, 4, 8, 32):
        file = torch.zeros(offset + data.numel(), dtype=torch.uint8)
        file[offset:] = data
        _assert_equals_dense(x, file[offset:], fmt, (33, COLUMNS))


def test_rows_wider_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_TILE", COLUMNS // 2)
    fmt = FORMATS["Q5_K"]
    _assert_equals_dense(torch.randn(2, COLUMNS), _packed(fmt, 21, COLUMNS), fmt, (21, COLUMNS))


def test_tiles_of_the_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fmt = FORMATS["Q4_0"]
    rows = module.CPU_TILE // COLUMNS + 9
    _assert_equals_dense(torch.randn(2, COLUMNS), _packed(fmt, rows, COLUMNS), fmt, (rows, COLUMNS))


@every_format
def test_the_packed_bytes_and_the_input_are_left_as_they_were(fmt: type[Format]) -> None:
    data, x, bias = _packed(fmt, 40, COLUMNS), torch.randn(2, COLUMNS), torch.randn(40)
    before = [tensor.clone() for tensor in (data, x, bias)]
    linear(x, PackedTensor(data, fmt, (40, COLUMNS)), bias)
    assert all(map(torch.equal, before, (data, x, bias)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autograd_modes(mode: type[torch.no_grad]) -> None:
    fmt = FORMATS["Q4_K"]
    data, x = _packed(fmt, 40, COLUMNS), torch.randn(2, COLUMNS)
    expected = linear(x, PackedTensor(data, fmt, (40, COLUMNS)))
    with mode():
        assert torch.equal(linear(x, PackedTensor(data, fmt, (40, COLUMNS))), expected)


@pytest.mark.parametrize("learns", ["x", "bias"])
def test_gradients(learns: str) -> None:
    fmt = FORMATS["Q8_0"]
    data, x, bias = _packed(fmt, 40, COLUMNS), torch.randn(3, COLUMNS), torch.randn(40)
    learned = {"x": x, "bias": bias}[learns].requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(linear(x, PackedTensor(data, fmt, (40, COLUMNS)), bias).sum(), learned)
        dense = F.linear(x, dequantize(data, fmt, (40, COLUMNS)), bias)
        (expected,) = torch.autograd.grad(dense.sum(), learned)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [8, 40], ids=["one tile", "tiles"])
@pytest.mark.parametrize("columns", [COLUMNS // 2, 2 * COLUMNS])
def test_inputs_of_another_width_are_refused(rows: int, columns: int) -> None:
    fmt = FORMATS["Q8_0"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(4, columns), PackedTensor(_packed(fmt, rows, COLUMNS), fmt, (rows, COLUMNS)))
