"""Weights for layers whose input is rounded to 8 bits as well, with what a calibration tells of that input."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.packed import PackedTensor
from ..formats.eight_bit_products import EightBitProducts
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
# prompts that were recorded, which flatter it.
ALLOWED = 1.0
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class _Candidate:
    packed: PackedTensor
    error: float


def encode_calibrated(
    weight: torch.Tensor, fmt: EightBitProducts, statistics: LayerStatistics
) -> PackedTensor:
    """weight [out, in] (float, any device) with the scale of its input chosen beforehand, on weight's device.

    fmt: a static format. Outlier channels of the input are made smaller, and their weights larger, as far as this
    lowers the error of the layer's output for the recorded rows. Where one scale for all rows is worse than a
    scale for each row even so, the result is in the dynamic format with a factor instead.
    """
    values = weight.to(torch.float32)
    statistics = _moved(statistics, weight.device)
    factors = [_factor(statistics, strength) for strength in STRENGTHS]
    if statistics.sample is None:
        return _static(values, fmt, factors[2], statistics)
    x = statistics.sample.to(torch.float32)
    exact = x @ values.t()
    plain = _tried(x, exact, quantize_packed(values, EightBitProducts(fmt.stored)))
    static = min(
        (_tried(x, exact, _static(values, fmt, factor, statistics)) for factor in factors), key=_error
    )
    if static.error <= ALLOWED * plain.error:
        return static.packed
    smooth = (_tried(x, exact, _smooth(values, fmt, factor)) for factor in factors)
    return min(smooth, key=_error).packed


def _error(candidate: _Candidate) -> float:
    return candidate.error


def _tried(x: torch.Tensor, exact: torch.Tensor, packed: PackedTensor) -> _Candidate:
    error = torch.linalg.vector_norm(eight_bit_linear(x, packed) - exact).item()
    return _Candidate(packed, error)


def _factor(statistics: LayerStatistics, strength: float) -> torch.Tensor:
    """float32 [in]: 1 for ordinary channels, less for those that exceed the median one."""
    absmax = statistics.absmax
    # Where most channels are next to nothing, as may be by chance, the others are not outliers.
    return (absmax / absmax.median().clamp_min(_TINY)).clamp(1, LARGEST_OUTLIER).pow(-strength)


def _smooth(values: torch.Tensor, fmt: EightBitProducts, factor: torch.Tensor) -> PackedTensor:
    plain = quantize_packed(values / factor, EightBitProducts(fmt.stored))
    parts = {"scale": plain.parts["scale"], "factor": factor}
    return PackedTensor(plain.data, EightBitProducts(fmt.stored, "smooth"), plain.shape, parts)


def _static(
    values: torch.Tensor, fmt: EightBitProducts, factor: torch.Tensor, statistics: LayerStatistics
) -> PackedTensor:
    plain = quantize_packed(values / factor, EightBitProducts(fmt.stored))
    # No channel exceeds its own magnitude, nor the range of all.
    low = (torch.maximum(-statistics.absmax, statistics.range[0]) * factor).amin()
    high = (torch.minimum(statistics.absmax, statistics.range[1]) * factor).amax()
    if fmt.stored == "int8":
        middle, half = (high + low) / 2, (high - low) / 2 * MARGIN
    else:  # the steps of a float are finest around zero
        middle, half = torch.zeros_like(high), torch.maximum(high, -low) * MARGIN
    half = torch.maximum(half, middle.abs() * 1e-2)  # inputs that are all the same
    step = (half / fmt.largest).clamp_min(_TINY).view(1)
    shift = (-middle / step).view(1)
    scale = plain.parts["scale"]
    sums = plain.data.view(plain.shape).sum(1, dtype=torch.float32) if fmt.stored == "int8" else scale * 0
    parts = {
        "scale": scale,
        "factor": factor / step,
        "step": step,
        "shift": shift,
        "offset": -shift * step * scale * sums,
    }
    return PackedTensor(plain.data, fmt, plain.shape, parts)


def _moved(statistics: LayerStatistics, device: torch.device) -> LayerStatistics:
    sample = None if statistics.sample is None else statistics.sample.to(device)
    return LayerStatistics(
        statistics.mean_square.to(device),
        statistics.absmax.to(device),
        statistics.range.to(device),
        statistics.rows,
        sample,
    )
