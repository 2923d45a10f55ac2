"""Packed tensors of any format from its name: random codes and scales, with blocks of zeros."""

from __future__ import annotations

import math

import torch
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import Format
from snug.quant_backends.formats.four_bit_encoder import VALUES
from snug.quant_backends.formats.scaled import (
    BitsAndBytes4Bit,
    QuantoGroups,
    RotatedRows,
    ScaledElements,
    format_called,
)
from snug.quant_backends.formats.scaled_base import rows_and_columns
from snug.quant_backends.formats.scaled_elements import STORED


def random_packed(
    name: str, shape: tuple[int, ...], scale_dtype: torch.dtype = torch.float32, seed: int = 0
) -> PackedTensor:
    """A tensor of the format called `name`; every third scale is 0. For ggml's formats bytes are random."""
    generator = torch.Generator().manual_seed(seed)
    fmt = format_called(name)
    if isinstance(fmt, type) and issubclass(fmt, Format):
        return PackedTensor(_bytes((fmt.nbytes(shape),), generator), fmt, shape)
    if isinstance(fmt, BitsAndBytes4Bit):
        return _four_bit(fmt, shape, scale_dtype, generator)
    if isinstance(fmt, QuantoGroups):
        groups = math.prod(shape) // fmt.group_size
        data = _bytes((-(-groups * fmt.bits // 8), fmt.group_size), generator)
        parts = {"scale": _scales((groups, 1), scale_dtype, generator)}
        return PackedTensor(data, fmt, shape, parts | {"shift": parts["scale"] * 2 ** (fmt.bits - 1)})
    if isinstance(fmt, RotatedRows):
        parts = {"scale": _scales((shape[0], 1), scale_dtype, generator)}
        return PackedTensor(_bytes(shape, generator).view(torch.int8), fmt, shape, parts)
    assert isinstance(fmt, ScaledElements)
    data = _bytes(shape, generator).view(STORED[fmt.stored])
    if data.is_floating_point():
        data = torch.where(data.float().isfinite(), data.float(), 0).to(data.dtype)
    sizes = rows_and_columns(shape)
    grid = tuple(-(-size // (block or size)) for size, block in zip(sizes, fmt.block, strict=True))
    parts = {"scale": _scales(grid, scale_dtype, generator)}
    if fmt.zero:
        parts["zero"] = torch.randint(-8, 8, grid, generator=generator).to(torch.int8)
    return PackedTensor(data, fmt, shape, parts)


def _four_bit(
    fmt: BitsAndBytes4Bit, shape: tuple[int, ...], scale_dtype: torch.dtype, generator: torch.Generator
) -> PackedTensor:
    weights = math.prod(shape)
    blocks = -(-weights // fmt.block_size)
    parts = {"quant_map": torch.tensor(VALUES[fmt.quant_type])}
    if fmt.nested:
        parts |= {
            "absmax": _bytes((blocks,), generator),
            "nested_absmax": _scales((-(-blocks // fmt.nested),), torch.float32, generator),
            "nested_quant_map": torch.linspace(-1, 1, 256),
            "nested_offset": torch.tensor([0.125]),
        }
    else:
        parts["absmax"] = _scales((blocks,), scale_dtype, generator)
    return PackedTensor(_bytes((-(-weights // 2), 1), generator), fmt, shape, parts)


def _bytes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _scales(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    scales = torch.rand(shape, generator=generator) / 64
    scales.view(-1)[::3] = 0
    return scales.to(dtype)
