"""Weights for layers whose input is rounded to 8 bits as well, with what a calibration tells of that input."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.packed import PackedTensor
from ..formats.eight_bit_products import EightBitProducts, shift_offset
from ..kernels.dequantize import quantize_packed
from ..kernels.eight_bit import eight_bit_linear
from .calibration import LayerStatistics

# How strongly outlier channels are made smaller, to choose from: 0 not at all, 1 to the size of the median channel.
STRENGTHS = (0.0, 0.25, 0.5, 0.75)
# Beyond this many times the median channel, an outlier counts as if it was no larger.
LARGEST_OUTLIER = 100
# By how much other prompts may exceed the recorded range: what lies beyond is cut off, which costs far more than the
# wider steps.
MARGIN = 1.3
# A layer gets a static scale as long as its error is at most this many times that of the plain dynamic one: for the
# prompts that were recorded, which flatter it. Errors of float8 hardly depend on the scale.
ALLOWED = {"int8": 1.0, "float8_e4m3fn": 1.05}
_TINY = torch.finfo(torch.float32).tiny


def encode_calibrated(
    weight: torch.Tensor, fmt: EightBitProducts, statistics: LayerStatistics
) -> PackedTensor:
    """weight [out, in] (float, any device) with the scale of its input chosen beforehand, on weight's device.

    fmt: a static format. For int8, outlier channels of the input are made smaller, and their weights larger, as far as
    this lowers the error of the layer's output for the recorded rows. Where one scale for all rows is worse than a
    scale for each row even so, the result is in a dynamic format, for int8 with a factor, instead.
    """
    values = weight.to(torch.float32)
    statistics = _moved(statistics, weight.device)
    plain = quantize_packed(values, EightBitProducts(fmt.stored))
    if fmt.stored == "int8":
        factors = [_factor(statistics, strength) for strength in STRENGTHS]
        if statistics.sample is None:
            return _shifted(values, fmt, factors[2], statistics)
        static = [_shifted(values, fmt, factor, statistics) for factor in factors]
        dynamic = [_smooth(values, fmt, factor) for factor in factors]
    else:
        static, dynamic = [_with_step(plain, fmt, statistics)], [plain]
        if statistics.sample is None:
            return static[0]
    x = statistics.sample.to(torch.float32)
    exact = x @ values.t()
    best, error = _best(x, exact, static)
    allowed = ALLOWED[fmt.stored] * _error(x, exact, plain)
    return best if error <= allowed else _best(x, exact, dynamic)[0]


def _best(
    x: torch.Tensor, exact: torch.Tensor, candidates: Sequence[PackedTensor]
) -> tuple[PackedTensor, float]:
    errors = [_error(x, exact, packed) for packed in candidates]
    least = min(errors)
    return candidates[errors.index(least)], least


def _error(x: torch.Tensor, exact: torch.Tensor, packed: PackedTensor) -> float:
    return torch.linalg.vector_norm(eight_bit_linear(x, packed) - exact).item()


def _factor(statistics: LayerStatistics, strength: float) -> torch.Tensor:
    """float32 [in]: 1 for ordinary channels, less for those that exceed the median one."""
    absmax = statistics.absmax
    # Where most channels are next to nothing, as may be by chance, the others are not outliers.
    return (absmax / absmax.median().clamp_min(_TINY)).clamp(1, LARGEST_OUTLIER).pow(-strength)


def _smooth(values: torch.Tensor, fmt: EightBitProducts, factor: torch.Tensor) -> PackedTensor:
    plain = quantize_packed(values / factor, EightBitProducts(fmt.stored))
    parts = {"scale": plain.parts["scale"], "factor": factor}
    return PackedTensor(plain.data, EightBitProducts(fmt.stored, "smooth"), plain.shape, parts)


def _shifted(
    values: torch.Tensor, fmt: EightBitProducts, factor: torch.Tensor, statistics: LayerStatistics
) -> PackedTensor:
    plain = quantize_packed(values / factor, EightBitProducts(fmt.stored))
    # No channel exceeds its own magnitude, nor the range of all.
    low = (torch.maximum(-statistics.absmax, statistics.range[0]) * factor).amin()
    high = (torch.minimum(statistics.absmax, statistics.range[1]) * factor).amax()
    middle, half = (high + low) / 2, (high - low) / 2 * MARGIN
    half = torch.maximum(half, middle.abs() * 1e-2)  # inputs that are all the same
    step = (half / fmt.largest).clamp_min(_TINY).view(1)
    parts = {**plain.parts, "factor": factor / step, "step": step, "shift": (-middle / step).view(1)}
    parts["offset"] = shift_offset(plain.data.view(plain.shape), parts)
    return PackedTensor(plain.data, fmt, plain.shape, parts)


def _with_step(plain: PackedTensor, fmt: EightBitProducts, statistics: LayerStatistics) -> PackedTensor:
    """float8, whose steps are finest around zero: nothing is shifted."""
    step = (statistics.absmax.amax() * MARGIN / fmt.largest).clamp_min(_TINY).view(1)
    return PackedTensor(plain.data, fmt, plain.shape, {**plain.parts, "step": step})


def _moved(statistics: LayerStatistics, device: torch.device) -> LayerStatistics:
    sample = None if statistics.sample is None else statistics.sample.to(device)
    return LayerStatistics(
        statistics.mean_square.to(device),
        statistics.absmax.to(device),
        statistics.range.to(device),
        statistics.rows,
        sample,
    )
