"""The search for scales and codes that K-quants and IQ4 encode with, vectorised over blocks.

As in ggml's `make_qkx2_quants` and `make_qx_quants` (ggml-quants.c) some candidates for the scale of each sub-block are
tried; for the codes of each the best scale follows from least squares. Unlike there, all scales of a block are then
fitted to one another: rounding a sub-block's scale moves its minimum, and the numbers they are multiples of are fitted
to all codes. The error that is minimised is the sum of importance * (weight - decoded)^2.

Sub-blocks lie across, [size, sub-blocks]: torch is several times faster along one long dimension. x is a weight, w its
importance, l its code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .encoding import inverse

# More than any block can hold: a float16 scale times the largest codes is below 3e8.
_LARGEST = 1e9
LEAST_IMPORTANCE = 1e-6  # of the largest; channels that were never active still get sensible codes
_EQUAL = 1e-6  # of a gain; rounding makes as much of a difference
_UNITS = 12  # candidates for what the scales of a block are multiples of
_SINGULAR = 3e-6  # below this part of their product, the difference of two sums is what rounding left
_LARGEST_HALF, _LEAST_HALF = 65504.0, 2.0**-24

# Puts every number to its nearest level, in place.
Nearest = Callable[[torch.Tensor], torch.Tensor]


class Affine(NamedTuple):
    """Weight = d * scale * code - dmin * minimum.

    d, dmin: float32 [n, 1], float16 numbers. scales, minima: whole numbers as float32 [n, sub-blocks of a block].
    codes: uint8 [n, weights of a block].
    """

    d: torch.Tensor
    dmin: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor
    codes: torch.Tensor


class Symmetric(NamedTuple):
    """Weight = d * scale * level. d, scales as in `Affine`; levels: float32 [n, weights of a block]."""

    d: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor


class _Sums(NamedTuple):
    """Sums over each sub-block, float32 [n, sub-blocks of a block] unless said otherwise.

    total: of w. x: of w * x. code: of w * l. product: of w * x * l. square: of w * l * l.
    """

    total: torch.Tensor
    x: torch.Tensor
    code: torch.Tensor
    product: torch.Tensor
    square: torch.Tensor


class _SubBlocks:
    """The values and importances of the sub-blocks of a chunk, and buffers for what is calculated of them."""

    def __init__(self, values: torch.Tensor, importance: torch.Tensor | None, size: int) -> None:
        # torch adds columns up in another order where they fill no vectors: without whole vectors, codes could depend
        # on how many blocks are encoded together.
        self.blocks = len(values)
        values = _padded(values)
        importance = None if importance is None else _padded(importance)
        # What is no number counts as zero; what is too large is as large as possible.
        self.x = _across(values, size).nan_to_num_(0.0, _LARGEST, -_LARGEST).clamp_(-_LARGEST, _LARGEST)
        self.shape = (values.shape[0], values.shape[1] // size)
        self.w = None if importance is None else _across(importance, size).clamp_(min=LEAST_IMPORTANCE)
        self.wx = self.x if self.w is None else self.w * self.x
        self.total = torch.full_like(self.x[0], size) if self.w is None else self.w.sum(0)
        self.sum_x = self.wx.sum(0)
        self.codes = torch.empty_like(self.x)
        self._product = torch.empty_like(self.x)

    def add_up(self, weighted: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
        """Sums of w * l, weighted * l and w * l * l for the codes that `codes` holds, into `out`."""
        torch.sum(torch.mul(self.codes, weighted, out=self._product), 0, out=out[1])
        if self.w is None:
            torch.sum(self.codes, 0, out=out[0])
            torch.mul(self.codes, self.codes, out=self._product)
        else:
            torch.sum(torch.mul(self.codes, self.w, out=self._product), 0, out=out[0])
            self._product.mul_(self.codes)
        torch.sum(self._product, 0, out=out[2])

    def sums(self, found: torch.Tensor | None = None) -> _Sums:
        """Sums for the codes that `codes` holds, or with what `add_up` has found of them: [3, sub-blocks]."""
        if found is None:
            found = torch.empty((3, self.x.shape[1]), device=self.x.device)
            self.add_up(self.wx, list(found))
        return _Sums(*(part.view(self.shape) for part in (self.total, self.sum_x, *found)))

    def joined(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers like `x` in the order of the weights: [n, weights of a block], contiguous."""
        return numbers.t().contiguous().view(self.shape[0], -1)[: self.blocks]


def fit_affine(
    values: torch.Tensor,
    importance: torch.Tensor | None,
    size: int,
    top: int,
    scale_top: int,
    candidates: Sequence[float],
    rounds: int = 2,
) -> Affine:
    """Codes 0..top, scales and minima 0..scale_top for values float32 [n, weights of a block].

    importance: as values, or None. size: weights of a sub-block. candidates: codes to give a sub-block's largest value.
    rounds: how often codes are chosen for the scales of a block and scales for the codes.
    """
    blocks = _SubBlocks(values, importance, size)
    scale, minimum, sums = _affine_start(blocks, top, candidates)
    d = _unit(scale, sums.square, (0, scale_top))
    dmin = _unit(minimum, sums.total, (0, scale_top))
    for fit in range(rounds):
        if fit:
            sums = blocks.sums()
            scale = _free_scale(sums)
        scales, minima = _round_scales(scale * inverse(d), d, dmin, scale_top, sums)
        d, dmin = _fit_units(d, dmin, scales, minima, sums)
        torch.add(blocks.x, (minima * dmin).view(-1), out=blocks.codes)
        blocks.codes.mul_(inverse(scales * d).view(-1)).round_().clamp_(0, top)
    n = blocks.blocks
    return Affine(d[:n], dmin[:n], scales[:n], minima[:n], blocks.joined(blocks.codes.to(torch.uint8)))


def fit_symmetric(
    values: torch.Tensor,
    importance: torch.Tensor | None,
    size: int,
    nearest: Nearest,
    scale_range: tuple[int, int],
    candidates: Sequence[float],
    zero_level: bool = True,
    rounds: int = 2,
) -> Symmetric:
    """Levels and scales for values float32 [n, weights of a block].

    scale_range: least and largest scale; the one of larger magnitude goes to the largest scale of a block. candidates:
    levels to give the value of largest magnitude. zero_level: whether zero is a level. Otherwise as `fit_affine`.
    """
    blocks = _SubBlocks(values, importance, size)
    largest = blocks.x.gather(0, blocks.x.abs().argmax(0, keepdim=True))[0]
    factors = torch.tensor(candidates, device=values.device).unsqueeze(1) * inverse(largest)
    found = torch.empty((3, *factors.shape), device=values.device)
    for number, factor in enumerate(factors):
        nearest(torch.mul(blocks.x, factor, out=blocks.codes))
        blocks.add_up(blocks.wx, list(found[:, number]))
    # The error is the sum of w * x * x less this.
    gain = (found[1].square() / found[2]).nan_to_num_(0.0, 0.0, 0.0)
    single = scale_range[0] == scale_range[1]  # then d is the scale itself, and a float16 number
    free = found[1] * inverse(found[2])
    lost = (half(free) - free).square_().mul_(found[2]) if single else None
    sums = blocks.sums(_pick(found, _best(gain, lost)))
    scale = sums.product * inverse(sums.square)
    d = half(scale / scale_range[0]) if single else _unit(scale, sums.square, scale_range)
    scales = scale
    for fit in range(rounds):
        if fit:
            sums = blocks.sums()
            scale = sums.product * inverse(sums.square)
        scales = (scale * inverse(d)).round_().clamp_(*scale_range)
        if zero_level:  # then codes for the smallest scale are never worse than all zeros
            scales = torch.where(scales == 0, torch.where(scale * d < 0, -1.0, 1.0), scales)
        if fit or rounds == 1:
            fitted = _dot(scales, sums.product) / _dot(scales.square(), sums.square)
            fitted = fitted.clamp_(-_LARGEST_HALF, _LARGEST_HALF).half().float()
            d = torch.where(fitted.isfinite() & (fitted != 0), fitted, d)
        nearest(torch.mul(blocks.x, inverse(scales * d).view(-1), out=blocks.codes))
    return Symmetric(d[: blocks.blocks], scales[: blocks.blocks], blocks.joined(blocks.codes))


def _unit(numbers: torch.Tensor, weights: torch.Tensor, bounds: tuple[int, int]) -> torch.Tensor:
    """What the numbers (float32 [n, sub-blocks of a block]) are multiples of, a float16 number: float32 [n, 1].

    Of some candidates the one with the least sum of weights * (number - multiple)^2, for multiples within bounds.
    """
    end = max(bounds, key=abs)
    stride = round(end / 32) or 1
    largest = numbers.gather(1, numbers.abs().argmax(1, keepdim=True))
    ends = torch.tensor([float(end - stride * number) for number in range(_UNITS)], device=numbers.device)
    tried = half(largest / ends).unsqueeze(2)
    steps = (numbers.unsqueeze(1) * inverse(tried)).round_().clamp_(*bounds).mul_(tried)
    error = steps.sub_(numbers.unsqueeze(1)).square_().mul_(weights.unsqueeze(1)).sum(2)
    return tried.squeeze(2).gather(1, error.nan_to_num_(0.0, 0.0, 0.0).argmin(1, keepdim=True))


def _best(gain: torch.Tensor, lost: torch.Tensor | None = None) -> torch.Tensor:
    """The number of the best candidate of each sub-block: gain is [candidates, sub-blocks].

    Of those that are equally good, as for constant weights, the one with the least of `lost`. Without that the first,
    which is the same for all sub-blocks of a block: their scales would differ, and be rounded, for nothing.
    """
    equal = gain >= gain.amax(0) * (1 - _EQUAL)
    return equal.to(torch.uint8).argmax(0) if lost is None else torch.where(equal, lost, torch.inf).argmin(0)


def _affine_start(
    blocks: _SubBlocks, top: int, candidates: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, _Sums]:
    """The best scale and minimum of each sub-block by itself [n, sub-blocks of a block], and the sums of its codes."""
    low = blocks.x.amin(0).clamp_(max=0)
    y = blocks.x - low  # numbers that start at zero lose no digits to a common offset
    wy = y if blocks.w is None else blocks.w * y
    factors = torch.tensor(candidates, device=y.device).unsqueeze(1) * inverse(y.amax(0))
    found = torch.empty((3, *factors.shape), device=y.device)
    for number, factor in enumerate(factors):
        torch.mul(y, factor, out=blocks.codes).round_()
        if candidates[number] > top:
            blocks.codes.clamp_(max=top)
        blocks.add_up(wy, list(found[:, number]))
    code, product, square = found
    total, sum_y = blocks.total, wy.sum(0)
    # Least squares for y = scale * code + shift; a minimum must not be negative, so shift is at most -low.
    determinant = total * square - code * code
    scale = (total * product - sum_y * code) / determinant
    shift = (square * sum_y - code * product) / determinant
    bound = (shift + low > 0) | ~(determinant > _SINGULAR * total * square)
    scale = torch.where(bound, (product + low * code) / square, scale)
    shift = torch.where(bound, -low, shift)
    gain = scale * (2 * product - scale * square - 2 * shift * code) + shift * (2 * sum_y - shift * total)
    best = _best(gain.nan_to_num_(-torch.inf, -torch.inf))
    sums = _pick(found, best)
    scale, shift = _pick(torch.stack([scale, shift]), best)
    flat = sums[2] == 0  # all codes are zero: the minimum is all there is
    scale = torch.where(flat, 0.0, scale).nan_to_num_(0.0, 0.0, 0.0).clamp_(min=0)
    minimum = -low - torch.where(flat, sum_y / total, shift).nan_to_num_(0.0, 0.0, 0.0)
    sums[1] += low * sums[0]
    return scale.view(blocks.shape), minimum.clamp_(min=0).view(blocks.shape), blocks.sums(sums)


def _free_scale(sums: _Sums) -> torch.Tensor:
    """The scale that is best for the codes with any minimum that is not negative."""
    determinant = sums.total * sums.square - sums.code * sums.code
    scale = (sums.total * sums.product - sums.x * sums.code) / determinant
    bound = (scale * sums.code < sums.x) | ~(determinant > _SINGULAR * sums.total * sums.square)
    scale = torch.where(bound, sums.product / sums.square, scale)
    return scale.nan_to_num_(0.0, 0.0, 0.0)


def _round_scales(
    near: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor, top: int, sums: _Sums
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima 0..top: of the scales around `near` the one that is best together with its best minimum."""
    near = near.round()
    to_minimum = inverse(dmin) / sums.total
    best = scales = minima = near
    for offset in (0, -1, 1):
        tried = (near + offset).clamp_(1, top)  # codes for the smallest scale are never worse than all zeros
        step = tried * d
        least = ((step * sums.code - sums.x) * to_minimum).round_().clamp_(0, top)
        shift = least * dmin
        error = step * (step * sums.square - 2 * (sums.product + shift * sums.code))
        error += shift * (shift * sums.total + 2 * sums.x)
        if offset == 0:
            best, scales, minima = error, tried, least
            continue
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, tried, scales)
        minima = torch.where(better, least, minima)
    return scales, minima


def _fit_units(
    d: torch.Tensor, dmin: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, sums: _Sums
) -> tuple[torch.Tensor, torch.Tensor]:
    """d and dmin by least squares over a block, float16 numbers; d alone where that has no solution."""
    a, c = _dot(scales.square(), sums.square), _dot(minima.square(), sums.total)
    b = _dot(scales * minima, sums.code)
    right, below = _dot(scales, sums.product), _dot(minima, sums.x)
    determinant = a * c - b * b
    new_d = half((c * right - b * below) / determinant)
    new_dmin = half((b * right - a * below) / determinant)
    usable = (determinant > _SINGULAR * a * c) & (new_d > 0) & (new_dmin >= 0)
    alone = half((right + dmin * b) / a)
    d = torch.where(alone > 0, alone, d)
    # Where all codes are zero the minima are all there is.
    dmin = torch.where(a > 0, dmin, half((-below / c).nan_to_num_(0.0, 0.0, 0.0).clamp_(min=0)))
    return torch.where(usable, new_d, d), torch.where(usable, new_dmin, dmin)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum over the sub-blocks of each block: [n, 1]."""
    return (a * b).sum(1, keepdim=True)


def _across(values: torch.Tensor, size: int) -> torch.Tensor:
    """float32 [n, weights of a block] as [size, sub-blocks], a copy."""
    return values.reshape(-1, size).t().clone(memory_format=torch.contiguous_format)


def _padded(values: torch.Tensor) -> torch.Tensor:
    """With rows of zeros up to a multiple of 64 rows."""
    missing = -len(values) % 64
    return torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing else values


def _pick(found: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """[k, candidates, sub-blocks] of the candidates of these numbers [sub-blocks]: [k, sub-blocks]."""
    return found.gather(1, best.expand(len(found), 1, -1)).squeeze(1)


def half(numbers: torch.Tensor) -> torch.Tensor:
    """Rounded to float16 and back; what is too large or too small for it becomes the last number that is not."""
    rounded = numbers.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()
    return torch.where((rounded == 0) & (numbers != 0), numbers.sign() * _LEAST_HALF, rounded)
