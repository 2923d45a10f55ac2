"""The formats of quantization libraries, and Snug's own of that kind, as targets.

Weights are encoded without the libraries, with the same result as theirs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..core.packed import PackedTensor
from ..formats import roundings
from ..formats.four_bit_encoder import SearchedFourBitEncoder
from ..formats.roundings import Rounding
from ..formats.row_encoder import ElementEncoder
from ..formats.scaled import BitsAndBytes4Bit, QuantoGroups, RotatedRows, ScaledElements, scaled_format
from ..formats.scaled_base import rows_and_columns
from ..kernels.dequantize import encode, quantize_packed
from .layers import LayerInfo
from .target import AnyFormat, Choose, Encode, SizedTargets, Target

ROWS = scaled_format("int8-rows")
# Sizes that bitsandbytes' quantize_4bit takes.
FOUR_BIT_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Divisors of the rows of usual models.
GROUPS = (32, 64, 128, 256)
NESTED = 256


def _always(name: str) -> Choose:
    fmt = scaled_format(name)
    return lambda layer, block, blocks: fmt if layer.shape else None


def _matrices(choose: Callable[[int], AnyFormat | None]) -> Choose:
    """For weights of two dimensions, by the length of their rows."""
    return lambda layer, block, blocks: (
        choose(layer.shape[1]) if len(layer.shape) == 2 and layer.shape[1] else None
    )


def _with(rounding: Rounding) -> Encode:
    """Elements by a library's arithmetic; whatever else a recipe asks for by its own encoder."""
    return partial(_encode, rounding)


def _encode(
    rounding: Rounding, values: torch.Tensor, fmt: AnyFormat, importance: torch.Tensor | None = None
) -> PackedTensor:
    if isinstance(fmt, ScaledElements) and fmt.encoder() is not None and not fmt.scb:
        return encode(values, ElementEncoder(fmt, rounding), importance)
    return quantize_packed(values, fmt, importance)


# bitsandbytes


def _four_bit(kind: str, nested: int, name: str, size: int) -> Target:
    fmt = BitsAndBytes4Bit(kind, size, nested)
    bits = 4 + (8 / size + 32 / (size * nested) if nested else 32 / size)
    return Target(name, "bitsandbytes", _matrices(lambda columns: fmt), bits)


_FOUR_BIT = tuple(
    SizedTargets(
        f"bitsandbytes {kind.upper()} block {{}}{' double' if nested else ''}",
        64,
        f"bitsandbytes {kind.upper()}{' double' if nested else ''}",
        FOUR_BIT_BLOCKS,
        partial(_four_bit, kind, nested),
    )
    for kind in ("nf4", "fp4")
    for nested in (0, NESTED)
)
_BITSANDBYTES_INT8 = Target(
    "bitsandbytes INT8",
    "bitsandbytes",
    _matrices(lambda columns: scaled_format("int8-rows-scb")),
    8.0,
    note="bitsandbytes' outlier threshold is about inputs while a model runs, which are not rounded with this target; "
    "bitsandbytes LLM.int8 does that.",
)


def _encode_searched(
    values: torch.Tensor, fmt: AnyFormat, importance: torch.Tensor | None = None
) -> PackedTensor:
    if isinstance(fmt, BitsAndBytes4Bit):
        return encode(values, SearchedFourBitEncoder(fmt), importance)
    return quantize_packed(values, fmt, importance)


_SEARCHED = Target(
    "bitsandbytes NF4 searched",
    "bitsandbytes",
    _matrices(lambda columns: BitsAndBytes4Bit("nf4", 64)),
    4.5,
    _encode_searched,
    note="The file is one of bitsandbytes; Snug looks for better scales than it does, and uses a calibration.",
)

# quanto


def _quanto_group(columns: int) -> int:
    """QModuleMixin's choice: 128 or a little less, whatever divides the row; else the row is one group."""
    size = 128
    if columns <= size:
        return columns
    while columns % size and size > 32:
        size -= 32
    return columns if columns % size else size


def _quanto_groups(bits: int) -> Choose:
    def choose(layer: LayerInfo, block: int, blocks: int) -> AnyFormat | None:
        columns = rows_and_columns(layer.shape)[1]
        return QuantoGroups(bits, _quanto_group(columns)) if len(layer.shape) > 1 and columns else None

    return choose


_QUANTO = (
    Target("quanto float8", "quanto", _always("float8_e4m3fn-rows"), 8.0, _with(roundings.QUANTO)),
    Target("quanto int8", "quanto", _always("int8-rows"), 8.0, _with(roundings.QUANTO)),
    Target("quanto int4", "quanto", _quanto_groups(4), 4.25, _with(roundings.QUANTO)),
    Target("quanto int2", "quanto", _quanto_groups(2), 2.25, _with(roundings.QUANTO)),
)

# torchao


def _torchao_groups(zero_rounding: Rounding, name: str, size: int) -> Target:
    fmt = scaled_format(f"int8-1x{size}-zero")
    bits = 8 + (32 + 8 if zero_rounding is roundings.TORCHAO else 16 + 8) / size
    choose = _matrices(lambda columns: None if columns % size else fmt)
    return Target(name, "torchao", choose, bits, _with(zero_rounding))


_TORCHAO_GROUPS = tuple(
    SizedTargets(
        f"torchao int8 group {{}}{suffix}",
        128,
        f"torchao int8 group 128{suffix}",
        GROUPS,
        partial(_torchao_groups, rounding),
    )
    for suffix, rounding in (("", roundings.TORCHAO), (" asymmetric", roundings.TORCHAO_ASYMMETRIC))
)
_TORCHAO = (
    Target(
        "torchao float8",
        "torchao",
        _matrices(lambda columns: scaled_format("float8_e4m3fn-rows")),
        8.0,
        _with(roundings.TORCHAO),
    ),
    Target(
        "torchao float8 per tensor",
        "torchao",
        _matrices(lambda columns: scaled_format("float8_e4m3fn-tensor")),
        8.0,
        _with(roundings.TORCHAO),
    ),
    Target(
        "torchao int8",
        "torchao",
        _matrices(lambda columns: scaled_format("int8-rows-zero")),
        8.0,
        _with(roundings.TORCHAO),
    ),
    *(family.target() for family in _TORCHAO_GROUPS),
    *(
        Target(name, "torchao", lambda layer, block, blocks: None, bits, unavailable=reason)
        for name, bits, reason in (
            (
                "torchao int4",
                4.5,
                "torchao's int4 weights are packed by kernels for one kind of GPU, of a package (mslk) that "
                "PyPI does not have; choose bitsandbytes NF4, quanto int4 or a GGUF type of 4 bits.",
            ),
            (
                "torchao int8 dynamic",
                8.0,
                "torchao's dynamic int8 also rounds the inputs of layers while a model runs; choose INT8 dynamic, "
                "which does the same, or torchao int8, which stores the same weights.",
            ),
            (
                "torchao float8 dynamic",
                8.0,
                "torchao's dynamic float8 also rounds the inputs of layers while a model runs; choose FP8 dynamic, "
                "which does the same, or torchao float8, which stores the same weights.",
            ),
        )
    ),
)

# Snug's own arithmetic: float8 with scales, as ComfyUI's scaled models have it, and ComfyUI's int8.

_FLOAT8 = tuple(
    Target(
        f"FP8 {kind} per {'row' if by == 'rows' else 'tensor'}",
        "fp8",
        _always(f"float8_{kind}-{by}"),
        8.0,
        _with(roundings.OWN),
    )
    for kind in ("e4m3fn", "e5m2")
    for by in ("rows", "tensor")
)


def _rotated(columns: int) -> AnyFormat:
    """The widest groups that divide the row; a row that none of them divides is not rotated."""
    return next((RotatedRows(size) for size in (256, 64, 16) if columns % size == 0), ROWS)


_INT8 = (
    Target("INT8 per row", "int8", _always("int8-rows"), 8.0),
    Target("INT8 per row rotated", "int8", _matrices(_rotated), 8.0),
)

SIZED: tuple[SizedTargets, ...] = (*_FOUR_BIT, *_TORCHAO_GROUPS)
LIBRARIES: tuple[Target, ...] = (
    *(family.target() for family in _FOUR_BIT),
    _SEARCHED,
    _BITSANDBYTES_INT8,
    *_TORCHAO,
    *_QUANTO,
    *_FLOAT8,
    *_INT8,
)
