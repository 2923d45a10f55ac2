"""K-quants and IQ4 come as close to the weights as ggml's own quantizers, with importance and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels.dequantize import dequantize, quantize, quantize_packed

libgguf = pytest.importorskip("libgguf", reason="libgguf has ggml's quantizers in native code")

SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
every_format = pytest.mark.parametrize("name", SEARCHED)
ROWS, COLUMNS = 64, 512
WORST_RATIO = 1.02


def _cases() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape or (ROWS, COLUMNS), generator=generator)

    weights = normal() * 0.02
    outliers = weights.clone()
    outliers[:, ::37] *= 20
    one_column = weights.clone()
    one_column[:, 5] *= 100
    parts = torch.exp2(normal(ROWS, COLUMNS // 32) * 2).repeat_interleave(32, 1)
    zeros = weights.clone()
    zeros[::3] = 0
    zeros.view(ROWS, -1, 32)[:, ::2] = 0
    return {
        "Gaussian": weights,
        "heavy tails": weights * normal().abs() ** 1.5,
        "columns of outliers": outliers,
        "one column of outliers": one_column,
        "rows of many scales": weights * torch.exp2(normal(ROWS, 1) * 4),
        "parts of many scales": weights * parts,
        "positive": weights.abs(),
        "zero blocks": zeros,
        "constant blocks": normal(ROWS, COLUMNS // 256).repeat_interleave(256, 1),
        "huge": weights * 1e7,
        "tiny": weights * 5e-5,
    }  # fmt: skip


CASES = _cases()
IMPORTANCE = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(5)).square() * 3e-4


def _native(name: str, weights: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    fmt = FORMATS[name]
    packed = libgguf.quantize_rows(
        weights.numpy(), fmt.ggml_type, None if importance is None else importance.numpy()
    )
    data = torch.from_numpy(np.ascontiguousarray(packed).view(np.uint8))
    return dequantize(data, fmt, weights.shape)


def _error(found: torch.Tensor, weights: torch.Tensor, importance: torch.Tensor | None) -> float:
    squares = (found.double() - weights.double()).square()
    return (squares if importance is None else squares * importance).sum().sqrt().item()


@every_format
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["alike", "importance"])
def test_error_is_at_most_ggmls(name: str, case: str, importance: torch.Tensor | None) -> None:
    weights = CASES[case]
    found = dequantize(quantize(weights, FORMATS[name], importance), FORMATS[name], weights.shape)
    ours, theirs = (
        _error(values, weights, importance) for values in (found, _native(name, weights, importance))
    )
    # Where ggml is nearly exact the ratio means nothing: a few units of float16, which scales are in, are as good.
    nothing = 3 * 2**-11 * _error(torch.zeros_like(weights), weights, importance)
    assert ours <= max(WORST_RATIO * theirs, nothing)


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K"])
@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["alike", "importance"])
def test_constant_weights_lose_only_the_rounding_of_scales(
    name: str, importance: torch.Tensor | None
) -> None:
    """Candidates that are equally good must not differ from one sub-block to the next."""
    weights = torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(2)).expand(ROWS, COLUMNS)
    weights = weights.contiguous()
    found = dequantize(quantize(weights, FORMATS[name], importance), FORMATS[name], weights.shape)
    # Scales are float16: half a unit is 2^-12 of a number at most.
    assert _error(found, weights, None) < 1.5 * 2**-12 * _error(torch.zeros_like(weights), weights, None)


def _constant_cases() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def constants(run: int) -> torch.Tensor:
        numbers = torch.randn((ROWS, COLUMNS // run), generator=generator)
        return numbers.repeat_interleave(run, 1)

    rows, noise = constants(COLUMNS), torch.randn((ROWS, COLUMNS), generator=generator)
    small, large = constants(16), constants(32)
    return {
        "rows": rows,
        "positive rows": rows.abs(),
        "negative rows": -rows.abs(),
        "rows of large numbers": rows * 1e5,
        "rows of tiny numbers": rows * 1e-5,
        "blocks": constants(256),
        "sub-blocks of 16": small,
        "positive sub-blocks of 16": small.abs(),
        "negative sub-blocks of 16": -small.abs(),
        "sub-blocks of 32": large,
        "positive sub-blocks of 32": large.abs(),
        "negative sub-blocks of 32": -large.abs(),
        "nearly equal rows": rows * (1 + 1e-4 * noise),
        "rather equal rows": rows * (1 + 1e-3 * noise),
        "still equal rows": rows * (1 + 1e-2 * noise),
        "nearly equal sub-blocks": large * (1 + 1e-3 * noise),
    }


CONSTANT_CASES = _constant_cases()
WITH_ZEROS = torch.where(torch.arange(COLUMNS) % 3 == 0, 0.0, IMPORTANCE)


@every_format
@pytest.mark.parametrize("importance", [IMPORTANCE, WITH_ZEROS], ids=["importance", "zeros in it"])
def test_constant_weights_are_as_exact_as_ggmls(name: str, importance: torch.Tensor) -> None:
    """Where all that is left is the rounding of scales, nothing is allowed for it."""
    worse = {}
    for case, weights in CONSTANT_CASES.items():
        found = dequantize(quantize(weights, FORMATS[name], importance), FORMATS[name], weights.shape)
        ours = _error(found, weights, importance)
        theirs = _error(_native(name, weights, importance), weights, importance)
        if ours > WORST_RATIO * theirs:
            worse[case] = ours / theirs
    assert not worse


@every_format
def test_importance_moves_the_error_to_where_it_matters_less(name: str) -> None:
    weights = CASES["Gaussian"]
    importance = torch.where(torch.arange(COLUMNS) % 4 == 0, 1.0, 1e-3)
    plain, weighted = (
        dequantize(quantize(weights, FORMATS[name], given), FORMATS[name], weights.shape)
        for given in (None, importance)
    )
    assert _error(weighted, weights, importance) < 0.95 * _error(plain, weights, importance)
    assert _error(weighted, weights, None) > _error(plain, weights, None)


@every_format
def test_importance_is_of_input_channels_and_only_its_ratios_matter(name: str) -> None:
    fmt = FORMATS[name]
    weights = CASES["Gaussian"]
    packed = quantize(weights, fmt, IMPORTANCE)
    assert torch.equal(packed, quantize(weights, fmt, IMPORTANCE * 2.0**20))
    assert torch.equal(packed[3:5], quantize(weights[3:5], fmt, IMPORTANCE))
    folded = quantize(weights.view(-1, 256), fmt, IMPORTANCE)
    assert torch.equal(folded.view(-1), packed.view(-1)), "as UNets are stored"
    kernel = weights.view(ROWS, COLUMNS // 64, 8, 8).reshape(ROWS, COLUMNS // 64, 1, 64).repeat(1, 1, 4, 1)
    per_channel = IMPORTANCE[: COLUMNS // 64]
    of_kernel = quantize_packed(kernel.view(ROWS, COLUMNS // 64, 1, 256), fmt, per_channel)
    flat = quantize(kernel.reshape(ROWS, -1), fmt, per_channel.repeat_interleave(256))
    assert torch.equal(of_kernel.data, flat.view(-1))


@every_format
@pytest.mark.parametrize("given", [0.0, float("nan"), float("inf")], ids=str)
def test_importance_that_says_nothing(name: str, given: float) -> None:
    weights, fmt = CASES["Gaussian"][:4], FORMATS[name]
    found = dequantize(quantize(weights, fmt, torch.full((COLUMNS,), given)), fmt, weights.shape)
    plain = dequantize(quantize(weights, fmt), fmt, weights.shape)
    assert _error(found, weights, None) < 1.1 * _error(plain, weights, None)


def test_importance_of_another_model_is_refused() -> None:
    with pytest.raises(SnugError, match="Importance for 511 input channels does not fit .*64, 512"):
        quantize(CASES["Gaussian"], FORMATS["Q4_K"], torch.ones(511))


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38, -3e38], ids=str)
def test_what_is_no_weight_stays_in_its_block(name: str, value: float) -> None:
    fmt = FORMATS[name]
    weights = CASES["Gaussian"][:4].clone()
    weights[1, 300] = value
    found = dequantize(quantize(weights, fmt), fmt, weights.shape)
    assert found.isfinite().all()
    others = torch.tensor([0, 2, 3])
    plain = dequantize(quantize(CASES["Gaussian"][:4], fmt), fmt, weights.shape)
    assert torch.equal(found[others], plain[others])
    if value != value:  # counts as zero
        assert found[1, 300].abs() <= weights[0].abs().max()
        weights[1, 300] = 0
        assert _error(found, weights, None) < 1.1 * _error(plain, CASES["Gaussian"][:4], None)
    else:
        assert found[1, 300].sign() == (1 if value > 0 else -1)
        assert found[1, 300].abs() > 1e5


@every_format
def test_zeros_are_exact(name: str) -> None:
    fmt = FORMATS[name]
    for importance in (None, IMPORTANCE):
        for zero in (0.0, -0.0):
            found = dequantize(quantize(torch.full((2, 512), zero), fmt, importance), fmt, (2, 512))
            assert not found.any()


@every_format
def test_every_row_by_itself(name: str) -> None:
    """Chunks and neighbours change nothing."""
    fmt, weights = FORMATS[name], CASES["heavy tails"]
    level = CONSTANT_CASES["still equal rows"]
    mixed = torch.stack([level, weights], 1).view(-1, COLUMNS)
    alone = quantize(level[7:8], fmt, IMPORTANCE)
    assert torch.equal(quantize(level, fmt, IMPORTANCE)[7:8], alone)
    assert torch.equal(quantize(mixed, fmt, IMPORTANCE)[14:15], alone)
    packed = quantize(weights.repeat(5, 1), fmt)
    assert torch.equal(packed, quantize(weights, fmt).repeat(5, 1))
    assert torch.equal(quantize(weights[7:8].bfloat16(), fmt), quantize(weights[7:8].bfloat16().float(), fmt))
