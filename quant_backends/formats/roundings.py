"""How each library turns weights into one element per weight. Names say whose arithmetic it is; sources are of the
versions that the tests compare with bit for bit: bitsandbytes 0.50, optimum-quanto 0.2.7, torchao 0.18.

They all calculate in the weight's own dtype up to some point, which is kept. In blocks of zeros, where some of them
divide zero by zero, codes are 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .row_encoder import Rounding, Tensors

if TYPE_CHECKING:
    from .scaled_elements import ScaledElements

_FLOAT32 = torch.finfo(torch.float32)


def _magnitude(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The largest magnitude between the least and the largest value; NaN where there is one."""
    return torch.maximum(low.neg(), high).abs_()  # of zeros, plus zero


def _top(fmt: ScaledElements) -> float:
    """The largest number of both signs that a code can be."""
    dtype = fmt.data_dtype
    return torch.finfo(dtype).max if dtype.is_floating_point else 127.0


def _nearest(values: torch.Tensor, least: float, largest: float, dtype: torch.dtype) -> torch.Tensor:
    """To the nearest code, ties to even, saturating; what has no number (0 / 0 in a block of zeros) becomes 0."""
    if not dtype.is_floating_point:
        values = values.round()
    return values.nan_to_num(0.0, math.inf, -math.inf).clamp_(least, largest).to(dtype)


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


# Snug's own, in float32: the largest magnitude of a block becomes the largest code. Scales are never zero, so that
# blocks of zeros are zeros, and never infinite, which would make the whole block NaN.


def _own_scale(low: torch.Tensor, high: torch.Tensor, fmt: ScaledElements) -> Tensors:
    top = _top(fmt)
    return {"scale": (_magnitude(low, high) / top).clamp_(_FLOAT32.tiny, _FLOAT32.max / top)}


def _own_codes(values: torch.Tensor, parts: Tensors, fmt: ScaledElements) -> torch.Tensor:
    top, scaled = _top(fmt), values / parts["scale"]
    if not fmt.data_dtype.is_floating_point:
        scaled.round_()
    return scaled.clamp_(-top, top).to(fmt.data_dtype)  # NaN stays in float8


OWN = Rounding(torch.Tensor.float, _own_scale, _own_codes)


def _scale_of_one(low: torch.Tensor, high: torch.Tensor, fmt: ScaledElements) -> Tensors:
    return {"scale": low.new_ones(low.shape)}


def _cast(values: torch.Tensor, parts: Tensors, fmt: ScaledElements) -> torch.Tensor:
    top = _top(fmt)
    return values.clamp(-top, top).to(fmt.data_dtype)


# What a cast to float8 does, but for numbers beyond its range, which saturate.
CAST = Rounding(torch.Tensor.float, _scale_of_one, _cast)


# bitsandbytes.functional.int8_vectorwise_quant on what Int8Params gives it.


def _bitsandbytes_scale(low: torch.Tensor, high: torch.Tensor, fmt: ScaledElements) -> Tensors:
    return {"scale": _magnitude(low, high).float()}


def _bitsandbytes_codes(values: torch.Tensor, parts: Tensors, fmt: ScaledElements) -> torch.Tensor:
    return _nearest(values * (127.0 / parts["scale"]), -128, 127, torch.int8)


BITSANDBYTES = Rounding(torch.Tensor.half, _bitsandbytes_scale, _bitsandbytes_codes)


# optimum.quanto: AbsmaxOptimizer and quantize_symmetric.


def _quanto_scale(low: torch.Tensor, high: torch.Tensor, fmt: ScaledElements) -> Tensors:
    return {"scale": _magnitude(low, high) / _top(fmt)}


def _quanto_codes(values: torch.Tensor, parts: Tensors, fmt: ScaledElements) -> torch.Tensor:
    least = -_top(fmt) if fmt.data_dtype.is_floating_point else -128
    return _nearest(values / parts["scale"], least, _top(fmt), fmt.data_dtype)


QUANTO = Rounding(_same, _quanto_scale, _quanto_codes)


# torchao: Int8Tensor (choose_qparams_affine, symmetric with the smallest step of float32, and quantize_affine; zero
# points that are all zero are stored) and Float8Tensor (_choose_scale_float8 and _quantize_affine_float8).


def _torchao_scale(low: torch.Tensor, high: torch.Tensor, fmt: ScaledElements) -> Tensors:
    if fmt.data_dtype.is_floating_point:
        return {"scale": (_magnitude(low, high) / _top(fmt)).float()}
    scale = (_magnitude(low, high) / 127.5).clamp_(min=_FLOAT32.eps).float()
    return (
        {"scale": scale, "zero": torch.zeros_like(scale, dtype=torch.int8)} if fmt.zero else {"scale": scale}
    )


def _torchao_codes(values: torch.Tensor, parts: Tensors, fmt: ScaledElements) -> torch.Tensor:
    if fmt.data_dtype.is_floating_point:
        return _nearest(values.float() / parts["scale"], -_top(fmt), _top(fmt), fmt.data_dtype)
    codes = (values * (1.0 / parts["scale"])).round_()
    if fmt.zero:
        codes += parts["zero"]
    return codes.clamp_(-128, 127).to(torch.int8)


TORCHAO = Rounding(_same, _torchao_scale, _torchao_codes)


# torchao's IntxUnpackedToInt8Tensor, asymmetric: zero is always among the numbers that codes stand for.


def _torchao_range(low: torch.Tensor, high: torch.Tensor, fmt: ScaledElements) -> Tensors:
    if not fmt.zero:
        return _torchao_scale(low, high, fmt)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255.0).clamp_(min=torch.finfo(low.dtype).smallest_normal)
    zero = (-128 - (low / scale).round_()).clamp_(-128, 127)
    return {"scale": scale, "zero": zero.to(torch.int8)}


TORCHAO_ASYMMETRIC = Rounding(_same, _torchao_range, _torchao_codes)
