"""Low-rank changes of a layer, beside the weight and in it."""

from __future__ import annotations

import pytest
import torch
from random_packed import random_packed
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.kernels.low_rank import (
    LowRankShape,
    add_low_rank,
    decode_merged,
    merge_low_rank,
    padded_rank,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,)])
def test_both_ways_agree(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, down, up = (torch.randn(s, generator=generator) for s in (shape, (16, 24), (3, 24), (16, 3)))
    beside = torch.nn.functional.linear(x.to(dtype), weight.to(dtype))
    result = add_low_rank(beside, x.to(dtype), down.to(dtype), up.to(dtype))
    assert result is beside and result.shape == (*shape[:-1], 16)
    merged = merge_low_rank(weight.clone(), down, up)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    wanted = x @ (weight + up @ down).T
    assert torch.allclose(x @ merged.T, wanted, atol=1e-4)
    assert (result.float() - wanted).norm() < tolerance * wanted.norm()


def test_gradients_reach_the_input() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    down, up = torch.randn(2, 8), torch.randn(6, 2)
    with torch.enable_grad():
        add_low_rank(torch.nn.functional.linear(x, torch.zeros(6, 8)), x, down, up).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, (up @ down).sum(0).expand(4, 8), atol=1e-5)


def test_operations() -> None:
    shape = LowRankShape(3072, 1024, 16)
    assert shape.merge_flop == 2 * 16 * 3072 * 1024
    assert shape.branch_flop(100) == 2 * 100 * 16 * (3072 + 1024)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_branch_pays_up_to_a_number_of_tokens(dtype: torch.dtype, on_cpu: bool) -> None:
    """One token favours it in every layer, and there is one number of tokens from which on merging is cheaper."""
    for rows, columns, rank in ((3072, 3072, 16), (12288, 3072, 128), (64, 3072, 4)):
        shape = LowRankShape(rows, columns, rank)
        pays = [shape.branch_pays(1 << power, dtype, on_cpu) for power in range(24)]
        assert pays[0] and not pays[-1]
        assert pays == sorted(pays, reverse=True)
        fused = [shape.branch_pays(1 << power, dtype, on_cpu, fused=True) for power in range(24)]
        if not on_cpu:  # merging is cheaper then, so from fewer tokens on
            assert fused == sorted(fused, reverse=True) and fused[0]
            assert sum(fused) < sum(pays)


def test_ranks_are_padded_for_matrix_units_alone() -> None:
    assert [padded_rank(rank, torch.device("cpu")) for rank in (1, 17)] == [1, 17]
    assert [padded_rank(rank, torch.device("meta")) for rank in (1, 16, 17)] == [16, 16, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_decoded_merged_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    packed = random_packed("bnb-nf4-64", (16, 128))
    down, up = torch.randn(3, 128, generator=generator), torch.randn(16, 3, generator=generator)
    wanted = merge_low_rank(dequantize_packed(packed), down, up).to(dtype)
    assert torch.equal(decode_merged(packed, down, up, dtype), wanted)
