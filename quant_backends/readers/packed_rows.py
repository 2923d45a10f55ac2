"""Rows of packed weights: put under one another or cut out as they are stored, without decoding.

Rows are those of dimension 0. Whatever a packing does not allow (a block that crosses the cut, parts with different
tables) is answered with None, and the caller decodes. What comes out decodes to the same numbers bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

from ..core.host_memory import empty
from ..core.packed import PackedTensor
from ..formats.scaled import (
    BitsAndBytes4Bit,
    EightBitProducts,
    OutlierProducts,
    QuantoGroups,
    ScaledElements,
    ScaledFormat,
)
from ..formats.scaled_base import rows_and_columns

Shape = tuple[int, ...]
Kind = TypeVar("Kind", bound=ScaledFormat)


def join_packed(parts: Sequence[PackedTensor]) -> PackedTensor | None:
    """The rows of all parts in one tensor, or None. Shapes must agree in all dimensions but the first."""
    fmt, shape = parts[0].format, joined_shape(parts)
    if any(type(part.format) is not type(fmt) for part in parts):
        return None
    if isinstance(fmt, type):  # ggml: every part is a whole number of blocks
        if any(part.format is not fmt for part in parts):
            return None
        return PackedTensor(cat_rows([part.data for part in parts]), fmt, shape)
    # The scaled formats see a vector as one row, so that joining vectors is joining columns.
    join = _JOIN.get(type(fmt)) if len(shape) > 1 else None
    return join(parts, shape) if join else None


def cut_packed(packed: PackedTensor, start: int, stop: int) -> PackedTensor | None:
    """The rows start..stop, mostly as views, or None."""
    fmt, shape = packed.format, (stop - start, *packed.shape[1:])
    columns = math.prod(shape[1:])
    first, last = start * columns, stop * columns  # in weights
    if not isinstance(fmt, type):
        cut = _CUT.get(type(fmt)) if len(shape) > 1 else None
        return cut(packed, start, stop, shape) if cut else None
    if first % fmt.block_size or last % fmt.block_size:
        return None
    begin, end = (place // fmt.block_size * fmt.block_bytes for place in (first, last))
    return PackedTensor(packed.data[begin:end], fmt, shape)


def joined_shape(parts: Sequence[PackedTensor | torch.Tensor]) -> Shape:
    """The shape of the parts under one another."""
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def cat_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` along dimension 0 of one dtype, also of those that torch has no arithmetic for (float8)."""
    dtype = tensors[0].dtype
    if dtype.itemsize == 1:
        tensors = [tensor.contiguous().view(torch.uint8) for tensor in tensors]
    joined = empty(joined_shape(tensors), tensors[0].dtype, tensors[0].device)
    return torch.cat([*tensors], out=joined).view(dtype)


def _options(packed: PackedTensor, kind: type[Kind]) -> Kind:
    """The format of a tensor that the tables below sent to a function for `kind`."""
    return cast(Kind, packed.format)


def _cat_numbers(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Scales or zero points in one tensor; different dtypes meet in float32, in which all are calculated with."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    return cat_rows(tensors)


def _join_elements(parts: Sequence[PackedTensor], shape: Shape) -> PackedTensor | None:
    first = _options(parts[0], ScaledElements)
    formats = [_options(part, ScaledElements) for part in parts]
    block = _common_block(parts)
    if len({(fmt.stored, fmt.zero, fmt.scb) for fmt in formats}) > 1 or block is None:
        return None
    fmt = ScaledElements(first.stored, block, first.zero, first.scb)
    numbers = {
        name: _cat_numbers([_block_numbers(part, name, block) for part in parts]) for name in first.part_names
    }
    return PackedTensor(cat_rows([part.data.view(part.shape) for part in parts]), fmt, shape, numbers)


def _common_block(parts: Sequence[PackedTensor]) -> tuple[int, int] | None:
    """The block size (rows, columns) that all parts can be told in; None when columns are cut differently."""
    blocks = {_options(part, ScaledElements).block for part in parts}
    if len(blocks) == 1:
        ((down, _),) = blocks
        if down and all(part.shape[0] % down == 0 for part in parts[:-1]):
            return blocks.pop()
    across = {across for _, across in blocks} - {0}
    return None if len(across) > 1 else (1, across.pop() if across else 0)


def _block_numbers(packed: PackedTensor, name: str, block: tuple[int, int]) -> torch.Tensor:
    """A part as [blocks down, blocks across] of `block`, which is the tensor's own or finer."""
    rows, columns = rows_and_columns(packed.shape)
    down, across = _options(packed, ScaledElements).block
    numbers = packed.parts[name].view(-(-rows // down) if down else 1, -1)
    if down != block[0]:
        numbers = numbers.repeat_interleave(down or rows, dim=0)[:rows]
    if across != block[1]:
        numbers = numbers.expand(-1, -(-columns // block[1]))
    return numbers.contiguous()


def _cut_elements(packed: PackedTensor, start: int, stop: int, shape: Shape) -> PackedTensor:
    fmt = _options(packed, ScaledElements)
    down, across = fmt.block
    aligned = down == 0 or start % down == 0
    block = fmt.block if aligned else (1, across)
    begin, end = (start // block[0], -(-stop // block[0])) if block[0] else (0, 1)
    numbers = {name: _block_numbers(packed, name, block)[begin:end] for name in fmt.part_names}
    fmt = ScaledElements(fmt.stored, block, fmt.zero, fmt.scb)
    return PackedTensor(packed.data.view(packed.shape)[start:stop], fmt, shape, numbers)


def _join_4bit(parts: Sequence[PackedTensor], shape: Shape) -> PackedTensor | None:
    first = _options(parts[0], BitsAndBytes4Bit)
    quant_map = parts[0].parts["quant_map"]
    for part in parts:
        fmt = _options(part, BitsAndBytes4Bit)
        if (fmt.quant_type, fmt.block_size) != (first.quant_type, first.block_size):
            return None
        if not torch.equal(part.parts["quant_map"].view(-1), quant_map.view(-1)):
            return None
    if any(math.prod(part.shape) % first.block_size for part in parts[:-1]):
        return None
    numbers = {"absmax": _cat_numbers([_plain_absmax(part) for part in parts]), "quant_map": quant_map}
    fmt = BitsAndBytes4Bit(first.quant_type, first.block_size)
    return PackedTensor(cat_rows([part.data.view(-1) for part in parts]), fmt, shape, numbers)


def _cut_4bit(packed: PackedTensor, start: int, stop: int, shape: Shape) -> PackedTensor | None:
    fmt = _options(packed, BitsAndBytes4Bit)
    columns = math.prod(shape[1:])
    first, last = start * columns, stop * columns
    if first % fmt.block_size:
        return None
    absmax = _plain_absmax(packed)[first // fmt.block_size : -(-last // fmt.block_size)]
    return PackedTensor(
        packed.data.view(-1)[first // 2 : -(-last // 2)],
        BitsAndBytes4Bit(fmt.quant_type, fmt.block_size),
        shape,
        {"absmax": absmax, "quant_map": packed.parts["quant_map"]},
    )


def _plain_absmax(packed: PackedTensor) -> torch.Tensor:
    """The absmax of every block. Nested ones are worked out, exactly as decoding does: their scales span blocks of
    256, and their offset belongs to one tensor."""
    fmt, absmax = _options(packed, BitsAndBytes4Bit), packed.parts["absmax"].view(-1)
    return fmt.plain_absmax(packed.parts, 0, absmax.numel()) if fmt.nested else absmax


def _join_groups(parts: Sequence[PackedTensor], shape: Shape) -> PackedTensor | None:
    fmt = _options(parts[0], QuantoGroups)
    # Integer shifts mean another formula, and products are rounded to the dtype of the scale.
    kinds = {
        (part.format, part.parts["scale"].dtype, part.parts["shift"].dtype.is_floating_point)
        for part in parts
    }
    if len(kinds) > 1:
        return None
    numbers = {
        name: _cat_numbers([part.parts[name].view(-1) for part in parts]) for name in ("scale", "shift")
    }
    return PackedTensor(_packed_groups(_group_codes(parts), fmt.bits), fmt, shape, numbers)


def _cut_groups(packed: PackedTensor, start: int, stop: int, shape: Shape) -> PackedTensor:
    fmt = _options(packed, QuantoGroups)
    begin, end = (row * math.prod(shape[1:]) // fmt.group_size for row in (start, stop))
    numbers = {name: packed.parts[name].view(-1)[begin:end] for name in ("scale", "shift")}
    return PackedTensor(_packed_groups(_group_codes([packed])[begin:end], fmt.bits), fmt, shape, numbers)


def _join_products(parts: Sequence[PackedTensor], shape: Shape) -> PackedTensor | None:
    """Layers of which nothing but rows is scaled: what else there is may differ from one to the other."""
    fmt = parts[0].format
    by_row = isinstance(fmt, OutlierProducts) or fmt == EightBitProducts("int8")
    if not by_row or any(part.format != fmt for part in parts):
        return None
    scale = cat_rows([part.parts["scale"].view(-1) for part in parts])
    data = cat_rows([part.data.view(part.shape) for part in parts])
    return PackedTensor(data, fmt, shape, {"scale": scale})


def _cut_products(packed: PackedTensor, start: int, stop: int, shape: Shape) -> PackedTensor:
    parts = {
        name: part.view(-1)[start:stop] if name in ("scale", "offset") and part.numel() > 1 else part
        for name, part in packed.parts.items()
    }
    return PackedTensor(packed.data.view(packed.shape)[start:stop], packed.format, shape, parts)


def _group_codes(parts: Sequence[PackedTensor]) -> torch.Tensor:
    """uint8 [groups of all parts, group size], one code each."""
    fmt = _options(parts[0], QuantoGroups)
    counts = [part.parts["scale"].numel() for part in parts]
    codes = empty((sum(counts), fmt.group_size), torch.uint8, parts[0].data.device)
    for part, place in zip(parts, codes.split(counts), strict=True):
        rows = part.data.view(-1, fmt.group_size)
        for plane, chunk in enumerate(place.split(len(rows)) if len(rows) else ()):
            torch.bitwise_right_shift(rows[: len(chunk)], plane * fmt.bits, out=chunk)
    return codes.bitwise_and_((1 << fmt.bits) - 1)


def _packed_groups(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [ceil(groups * bits / 8), group size]: the first groups in the low bits, the last in the high ones.

    The codes are used up.
    """
    packed = empty((-(-len(codes) * bits // 8), codes.shape[1]), torch.uint8, codes.device)
    for plane, chunk in enumerate(codes.split(len(packed)) if len(packed) else ()):
        if plane:
            packed[: len(chunk)].bitwise_or_(chunk.bitwise_left_shift_(plane * bits))
        else:
            packed.copy_(chunk)
    return packed


_JOIN: dict[type, Callable[[Sequence[PackedTensor], Shape], PackedTensor | None]] = {
    ScaledElements: _join_elements,
    BitsAndBytes4Bit: _join_4bit,
    QuantoGroups: _join_groups,
    EightBitProducts: _join_products,
    OutlierProducts: _join_products,
}
_CUT: dict[type, Callable[[PackedTensor, int, int, Shape], PackedTensor | None]] = {
    ScaledElements: _cut_elements,
    BitsAndBytes4Bit: _cut_4bit,
    QuantoGroups: _cut_groups,
    EightBitProducts: _cut_products,
    OutlierProducts: _cut_products,
}
