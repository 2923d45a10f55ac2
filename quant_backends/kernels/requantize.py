"""Weights that were decoded and changed, in their old format again."""

from __future__ import annotations

import torch

from ..core.packed import PackedTensor
from ..formats.eight_bit_products import EightBitProducts, shift_offset
from ..formats.scaled_elements import ScaledElements
from .dequantize import quantize, quantize_packed


def can_requantize(packed: PackedTensor) -> bool:
    """Whether `requantize` can encode in the format of `packed`."""
    fmt = packed.format
    if isinstance(fmt, ScaledElements) and fmt.block[1] and packed.shape[-1] % fmt.block[1]:
        return False  # the last group of a row is cut, which is only read
    return fmt.can_quantize or isinstance(fmt, EightBitProducts)


def requantize(values: torch.Tensor, like: PackedTensor) -> PackedTensor:
    """values (float32, of `like`'s shape) in the format of `like`, on their device.

    Scales are chosen anew from the values, where `like` was scaled at all. Raises SnugError for formats that cannot be
    written.
    """
    fmt = like.format
    if isinstance(fmt, type):
        # Blocks may cross rows, as in convolutions of SD1.5.
        data = quantize(values.reshape(-1, fmt.block_size), fmt).view(-1)
        return PackedTensor(data, fmt, tuple(values.shape))
    if isinstance(fmt, EightBitProducts):
        return _products(values, like, fmt)
    if _is_int8_rows(fmt):
        return _int8_rows(values, like)
    scale = like.parts.get("scale")
    if not isinstance(fmt, ScaledElements) or fmt.block != (0, 0) or scale is None or scale.item() == 1:
        return quantize_packed(values, fmt)
    # `quantize_packed` casts to float8 as it is; a weight with a scale of its own would lose its small values.
    new_scale = (values.abs().amax() / torch.finfo(fmt.data_dtype).max).to(scale.dtype).view_as(scale)
    new_scale.clamp_(min=torch.finfo(scale.dtype).tiny)  # zeros need any scale but zero
    scaled = quantize_packed(values / new_scale.float(), fmt)
    return PackedTensor(scaled.data, fmt, scaled.shape, {"scale": new_scale})


def _products(values: torch.Tensor, like: PackedTensor, fmt: EightBitProducts) -> PackedTensor:
    """The input is rounded as before: its factors, step and shift stay."""
    parts = {name: part for name, part in like.parts.items() if name != "offset"}
    if "factor" in parts:
        values = values / (parts["factor"] * parts.get("step", 1))
    new = quantize_packed(values, EightBitProducts(fmt.stored))
    parts |= new.parts
    if "offset" in like.parts:
        parts["offset"] = shift_offset(new.data.view(new.shape), parts)
    return PackedTensor(new.data, fmt, new.shape, parts)


def _is_int8_rows(fmt: object) -> bool:
    """int8 with a scale for each row: bitsandbytes' LLM.int8, quanto's qint8 and torchao's int8."""
    return isinstance(fmt, ScaledElements) and (fmt.stored, fmt.block) == ("int8", (1, 0))


def _int8_rows(values: torch.Tensor, like: PackedTensor) -> PackedTensor:
    """Rounded to the nearest of 255 steps between plus and minus the largest magnitude of a row; zero points are 0."""
    scale = like.parts["scale"]
    matrix = values.reshape(len(values), -1)
    largest = matrix.abs().amax(1, keepdim=True)
    scb = isinstance(like.format, ScaledElements) and like.format.scb
    part = (largest if scb else largest / 127).to(scale.dtype)
    step = part.float() / 127 if scb else part.float()
    # Rows of zeros have no scale, or one that 16 bits cannot hold.
    step.clamp_(min=torch.finfo(torch.float32).tiny)
    data = (matrix / step).round_().clamp_(-127, 127).to(torch.int8)
    parts = {name: torch.zeros_like(found) for name, found in like.parts.items() if name == "zero"}
    parts["scale"] = part.view_as(scale)
    return PackedTensor(data.view(values.shape), like.format, like.shape, parts)
