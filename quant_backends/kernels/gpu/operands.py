"""What the kernels are told about a packed weight: constants by its format and shape, and its tensors.

Imports no Triton, so that asking what the kernels can do needs none.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ...core.packed import PackedTensor
from ...formats import Format
from ...formats.bitsandbytes_4bit import BitsAndBytes4Bit
from ...formats.eight_bit_products import EightBitProducts
from ...formats.fp4 import LOOKED_UP
from ...formats.iq_tables import GRIDS, grid_table
from ...formats.outlier_products import WEIGHT, OutlierProducts
from ...formats.quanto_groups import QuantoGroups
from ...formats.rotated_rows import RotatedRows
from ...formats.scaled_base import ScaledFormat, rows_and_columns
from ...formats.scaled_elements import ScaledElements
from ...formats.tables import delta_grid

# Rows of x that are multiplied without matrix units. With more, those take fewer instructions for each weight, though
# they multiply 16 rows whatever there is: 5 to 16 for 8 rows, against 21 to 38 without them, as every weight is then
# multiplied eight times by each thread, with half as many weights in its registers (benchmarks/kernel_code.py). The
# packed weight is read once either way.
MOST_VECTORS = 4
# Positions in a matrix are 32-bit integers in the kernels.
_MOST_WEIGHTS = 1 << 31
# The longest run of weights that shares what is decoded once for it, and the widest group that is rotated in one tile.
_LONGEST_RUN, _WIDEST_ROTATION = 256, 1024
# Columns that a program can hold in registers: 48 for each of its threads.
_LONGEST_ROW = 3 << 13
_EXTRAS = {"dynamic": "", "smooth": "factor", "static": "static"}
_NO_PARTS: tuple[str, ...] = ()
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Constants:
    """The constants of `tiles.weight_tile`, for a matrix of `rows` and `columns`.

    family "blocks": kind the ggml type, a, b weights and bytes of a block. "elements": kind the dtype of the data, a, b
    rows and columns of a block, c what else is applied, d columns that are rotated. "groups": a bits, b columns of a
    group. "four_bit": a weights of a block, b of a nested one. "plain", only to be rounded: kind the dtype. parts:
    names of the tensors, in the order of arguments. unit: bytes of the integers that the data is read in; None: as the
    block's alignment allows. step: tiles are multiples of so many columns.
    """

    rows: int
    columns: int
    family: str
    kind: str
    a: int = 0
    b: int = 0
    c: str = ""
    d: int = 0
    run: int = 4
    parts: tuple[str, ...] = _NO_PARTS
    unit: int | None = None
    step: int = 4


@functools.lru_cache(maxsize=4096)
def constants(fmt: type[Format] | ScaledFormat, shape: tuple[int, ...]) -> Constants | None:
    """What the kernels need for a matrix of the format; None where they cannot take it as a matrix."""
    rows, columns = rows_and_columns(shape)
    if not 0 < rows * columns < _MOST_WEIGHTS:
        return None
    if isinstance(fmt, type):
        if fmt.dtype is not None or columns % fmt.block_size:
            return None
        size = fmt.block_size
        return Constants(rows, columns, "blocks", fmt.name, size, fmt.block_bytes, step=size)
    if isinstance(fmt, BitsAndBytes4Bit):
        return _four_bit(fmt, rows, columns)
    if columns % 4:
        return None
    if isinstance(fmt, OutlierProducts):
        fmt = WEIGHT
    elif isinstance(fmt, EightBitProducts) and fmt.stored != "int8":
        fmt = ScaledElements(fmt.stored, (0, 0))
    if isinstance(fmt, QuantoGroups):
        if fmt.group_size % 4:
            return None
        run = _run(fmt.group_size)
        return Constants(
            rows, columns, "groups", "", fmt.bits, fmt.group_size, run=run, parts=("scale", "shift"), unit=4
        )
    if isinstance(fmt, ScaledElements):
        down, across = fmt.block
        if across % 4:
            return None
        extra = "zero" if fmt.zero else "scb" if fmt.scb else ""
        parts = ("scale", "zero") if fmt.zero else ("scale",)
        return Constants(
            rows, columns, "elements", fmt.stored, down, across, extra, run=_run(across), parts=parts, unit=4
        )
    if isinstance(fmt, RotatedRows):
        size = fmt.group_size
        if size > _WIDEST_ROTATION:
            return None
        run = _run(0)
        return Constants(
            rows, columns, "elements", "int8", 1, d=size, run=run, parts=("scale",), unit=4, step=size
        )
    if isinstance(fmt, EightBitProducts):
        parts = {
            "dynamic": ("scale",),
            "smooth": ("scale", "scale", "factor"),
            "static": ("scale", "step", "factor"),
        }
        extra, found = _EXTRAS[fmt.activations], parts[fmt.activations]
        return Constants(rows, columns, "elements", fmt.stored, 1, c=extra, run=_run(0), parts=found, unit=4)
    return None


@functools.lru_cache(maxsize=4096)
def flat_constants(fmt: type[Format] | ScaledFormat, shape: tuple[int, ...]) -> Constants | None:
    """The same for decoding alone, where it does not matter what the rows are."""
    if isinstance(fmt, BitsAndBytes4Bit):
        return _four_bit(fmt, 1, math.prod(shape))
    if isinstance(fmt, type) and fmt.dtype is None:
        return Constants(1, math.prod(shape), "blocks", fmt.name, fmt.block_size, fmt.block_bytes)
    return constants(fmt, shape)


@functools.lru_cache(maxsize=4096)
def rounding_constants(fmt: type[Format] | ScaledFormat, shape: tuple[int, ...]) -> Constants | None:
    """What rounding the rows of a matrix to 8 bits needs; plain numbers are rounded, too."""
    if isinstance(fmt, type) and fmt.dtype in _PLAIN:
        rows, columns = rows_and_columns(shape)
        found = Constants(rows, columns, "plain", str(fmt.dtype).removeprefix("torch."), step=1)
    else:
        found = constants(fmt, shape)
    if found is None or found.columns > _LONGEST_ROW or not 0 < found.rows * found.columns < _MOST_WEIGHTS:
        return None
    return found


def _four_bit(fmt: BitsAndBytes4Bit, rows: int, columns: int) -> Constants | None:
    if fmt.block_size % 4 or (rows > 1 and columns % 4) or (rows * columns + 1) // 2 % 2:
        return None
    if not 0 < rows * columns < _MOST_WEIGHTS:
        return None
    run = _run(fmt.block_size if rows == 1 else math.gcd(fmt.block_size, columns))
    parts = ("absmax", "quant_map")
    if fmt.nested:
        parts += ("nested_absmax", "nested_quant_map", "nested_offset")
    return Constants(rows, columns, "four_bit", "", fmt.block_size, fmt.nested, run=run, parts=parts, unit=2)


def _run(block: int) -> int:
    """The largest power of two that divides a block (0: has no end), up to _LONGEST_RUN."""
    return math.gcd(block, _LONGEST_RUN)


def tensors(packed: PackedTensor, found: Constants) -> tuple[torch.Tensor, ...] | None:
    """The data as integers, or as plain numbers; then five tensors beside it (the data again where there is none).

    None where the data does not begin at a whole number of such integers.
    """
    data = packed.data.view(-1)
    # torch views bytes as wider integers where they begin at a multiple of those in their storage, too.
    address = data.data_ptr() | int(data.storage_offset()) * data.element_size()
    if found.family == "plain":
        dtype = getattr(torch, found.kind)
        return None if address % dtype.itemsize else (data.view(dtype),) * 6
    if found.unit is None:
        odd = address | found.b
        unit = 1 if odd & 1 else 2 if odd & 2 else 4
    else:
        unit = found.unit
        if address % unit:
            return None
    if unit > 1:
        data = data.view(torch.int16 if unit == 2 else torch.int32)
    if found.family == "blocks":
        table = block_table(found.kind, data.device)
        beside = (data if table is None else table,)
    else:
        beside = tuple(packed.parts[name] for name in found.parts)
    return (data, *beside, *(data,) * (5 - len(beside)))


@functools.cache
def block_table(name: str, device: torch.device) -> torch.Tensor | None:
    """What a ggml type looks up: float32 [16], or int32 words of its grid; None where it looks up nothing."""
    if name in LOOKED_UP:
        return torch.tensor(LOOKED_UP[name], dtype=torch.float32, device=device)
    if name in ("IQ1_S", "IQ1_M"):
        return delta_grid(device).view(torch.int32)
    if name in GRIDS:
        return grid_table(name, device).view(torch.int32)
    return None
