"""Triton's products from packed weights are as exact as torch's, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_device import DEVICE, needs_kernels, on_device
from random_packed import random_packed
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels import dispatch
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.kernels.dispatch import TORCH, TRITON, linear_by_kernel, using
from snug.quant_backends.kernels.linear import linear
from snug.quant_backends.kernels.low_rank import decode_merged

pytestmark = needs_kernels
SCALED = [
    "bnb-nf4-64",
    "bnb-nf4-64-nested-256",
    "int8-rows",
    "int8-1x32-zero",
    "float8_e4m3fn-rows",
    "float8_e4m3fn-128x128",
    "quanto-int4-128",
    "int8-rows-rotated-256",
]
GGML = [name for name, fmt in FORMATS.items() if fmt.dtype is None]


def ordinary(name: str, shape: tuple[int, int]) -> PackedTensor:
    """A random weight without the infinities and NaN that random bytes hold."""
    packed = random_packed(name, shape)
    if not isinstance(packed.format, type):
        return packed
    fmt = packed.format
    generator = torch.Generator().manual_seed(0)
    blocks = packed.data.view(-1, fmt.block_bytes).clone()
    wrong = torch.ones(len(blocks), dtype=torch.bool)
    while wrong.any():
        drawn = (int(wrong.sum()), fmt.block_bytes)
        blocks[wrong] = torch.randint(0, 256, drawn, dtype=torch.uint8, generator=generator)
        largest = fmt.dequantize_blocks(blocks).abs().amax(1)
        wrong = ~((largest > 1e-2) & (largest < 10))
    return PackedTensor(blocks.view(-1), fmt, shape)


def assert_as_exact(packed: PackedTensor, tokens: int, dtype: torch.dtype, bias: bool = True) -> None:
    """At most twice the error of torch's product in the same type, against float64."""
    rows, columns = packed.shape
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    added = torch.randn(rows, generator=generator).to(dtype) if bias else None
    with using(TORCH):
        exact = x.double() @ dequantize_packed(packed).double().t()
        exact += 0 if added is None else added.double()
        other = (linear(x, packed, added).double() - exact).norm()
    with using(TRITON):
        found = linear_by_kernel(x.to(DEVICE), on_device(packed), None if added is None else added.to(DEVICE))
    assert found is not None
    assert found.shape == (tokens, rows) and found.dtype == dtype
    limit = 2 * other + torch.finfo(dtype).eps * exact.norm() / 16
    assert (found.cpu().double() - exact).norm() <= limit


@pytest.mark.parametrize("name", [*GGML, *SCALED])
def test_every_format(name: str) -> None:
    packed = ordinary(name, (9, 256))
    assert_as_exact(packed, 2, torch.float32)
    assert_as_exact(packed, 19, torch.bfloat16, bias=False)


@pytest.mark.parametrize("tokens", [*range(1, 10), 64, 65, 129])
def test_numbers_of_rows_around_those_of_tiles(tokens: int) -> None:
    assert_as_exact(ordinary("Q8_0", (67, 96)), tokens, torch.float16)


@pytest.mark.parametrize("name", ["Q4_K", "bnb-nf4-64"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_columns_divided_among_programs(name: str, tokens: int, many_processors: None) -> None:
    assert_as_exact(ordinary(name, (3, 2048 + 256)), tokens, torch.bfloat16)


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    launch = dispatch._launch_module()
    launch._product_plan.cache_clear()
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 4)
    yield
    launch._product_plan.cache_clear()


def test_leading_dimensions_and_the_dispatch() -> None:
    packed = on_device(ordinary("Q4_K", (8, 256)))
    x = torch.randn(2, 3, 256, device=DEVICE, dtype=torch.float16)
    with using(TRITON):
        found = linear(x, packed)
        # Not contiguous, as halves of a modulation are.
        strided = linear(x.transpose(0, 1), packed)
    assert found.shape == (2, 3, 8)
    assert torch.equal(strided.transpose(0, 1), found)


def test_above_the_cap_the_weight_is_decoded_first() -> None:
    packed = on_device(ordinary("Q4_K", (8, 256)))
    cap = dispatch.most_tokens(DEVICE, torch.float16)
    with using(TRITON):
        for tokens, taken in ((cap, True), (cap + 1, False)):
            x = torch.zeros(tokens, 256, device=DEVICE, dtype=torch.float16)
            assert (linear_by_kernel(x, packed, None) is not None) == taken
        assert linear(torch.zeros(cap + 1, 256, device=DEVICE, dtype=torch.float16), packed).shape == (
            cap + 1,
            8,
        )


def test_gradients_take_torch() -> None:
    packed = on_device(ordinary("Q8_0", (8, 64)))
    x = torch.randn(2, 64, device=DEVICE, requires_grad=True)
    with using(TRITON):
        linear(x, packed).sum().backward()
    assert x.grad is not None
    with using(TORCH):
        expected = dequantize_packed(packed).sum(0)
    assert torch.allclose(x.grad, expected.expand(2, 64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "bnb-nf4-64", "quanto-int4-128", "int8-rows-rotated-256"])
def test_low_rank_changes_are_added_before_rounding(name: str) -> None:
    packed = ordinary(name, (21, 512))
    generator = torch.Generator().manual_seed(0)
    for rank, dtype, factors in (
        (16, torch.bfloat16, torch.bfloat16),
        (48, torch.float16, torch.float32),
        (32, torch.float32, torch.float16),
    ):
        up = torch.randn(21, rank, generator=generator).to(factors)
        down = (torch.randn(rank, 512, generator=generator) / 64).to(factors)
        with using(TORCH):
            weight = dequantize_packed(packed).double() + up.double() @ down.double()
        with using(TRITON):
            found = decode_merged(on_device(packed), down.to(DEVICE), up.to(DEVICE), dtype)
        assert found.dtype == dtype
        limit = torch.finfo(dtype).eps / 2 * weight.abs() + rank * 1e-7 * (
            up.double().abs() @ down.double().abs()
        )
        assert ((found.cpu().double() - weight).abs() <= limit + 1e-7).all()


def test_low_rank_changes_of_other_ranks_are_told_when_forced() -> None:
    packed = on_device(ordinary("Q4_0", (8, 64)))
    factors = torch.zeros(3, 64, device=DEVICE), torch.zeros(8, 3, device=DEVICE)
    with using(TRITON), pytest.raises(SnugError, match="no kernel for a Q4_0 weight"):
        decode_merged(packed, *factors, torch.float32)
    assert torch.equal(decode_merged(packed, *factors, torch.float32), dequantize_packed(packed))
