"""One element per weight (int8, uint8, float8) times the scale of the block that it lies in.

bitsandbytes' LLM.int8, quanto's qint8 and qfloat8, torchao's int8, intx and float8, and scaled fp8 are all this.
Layout, for blocks of r rows and c columns (either may be all of them)::

    data   the logical shape
    scale  float [ceil(rows / r), ceil(columns / c)], any shape of as many elements
    zero   (only "-zero") integer or float, like scale

    w = (data - zero) * scale                       "int8-rows", "float8_e4m3fn-tensor", "int8-1x32-zero"
    w = data * scale * (1 / 127)                    "int8-rows-scb": bitsandbytes' SCB is the row's largest magnitude

Written, unless a library's arithmetic is asked for (`roundings`), rounded to nearest, ties to even::

    scale = max |w| of the block / largest code; 1 for float8 with one scale ("-tensor", what a cast to float8 does)
    data  = clamp(w / scale, -largest, largest)

Beyond the largest number (448 in e4m3fn, 57344 in e5m2) it saturates; NaN stays, with its block. The error is at
most 1/16 of a weight in e4m3fn and 1/8 in e5m2, or scale * 2^-10 and scale * 2^-17 where that is more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .base import Scratch
from .float8 import to_float32
from .roundings import BITSANDBYTES, CAST, OWN, TORCHAO
from .row_encoder import ElementEncoder
from .scaled_base import FLOATS, ScaledFormat, repeated, rows_and_columns

if TYPE_CHECKING:
    from ..core.packed import PackedTensor

STORED = {
    name: getattr(torch, name)
    for name in ("int8", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}
ZEROS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, *FLOATS)
# The constant of bitsandbytes.functional.int8_vectorwise_dequant, which multiplies by it last.
ONE_127TH = 7.874015718698502502e-3

_NAME = re.compile(
    rf"({'|'.join(STORED)})-(?:(tensor)|(rows)|([1-9]\d{{0,8}})x([1-9]\d{{0,8}}))(-zero|-scb)?"
)


@dataclass(frozen=True, slots=True)
class ScaledElements(ScaledFormat):
    """stored: dtype name of the data; block: its (rows, columns), 0 for all; zero: with zero points; scb: see above."""

    stored: str
    block: tuple[int, int]
    zero: bool = False
    scb: bool = False

    @property
    def name(self) -> str:
        known = {(0, 0): "tensor", (1, 0): "rows"}
        block = known.get(self.block, f"{self.block[0]}x{self.block[1]}")
        return f"{self.stored}-{block}{'-zero' if self.zero else '-scb' if self.scb else ''}"

    @property
    def part_names(self) -> tuple[str, ...]:
        return ("scale", "zero") if self.zero else ("scale",)

    @classmethod
    def parse(cls, name: str) -> ScaledElements | None:
        match = _NAME.fullmatch(name)
        if not match:
            return None
        block = (0, 0) if match[2] else (1, 0) if match[3] else (int(match[4]), int(match[5]))
        return cls(match[1], block, match[6] == "-zero", match[6] == "-scb")

    def check_parts(self, packed: PackedTensor) -> None:
        self.expect(packed, "data", packed.data, math.prod(packed.shape), (self.data_dtype,))
        scales = math.prod(self._grid(packed.shape))
        self.expect(packed, "scale", packed.parts["scale"], scales, FLOATS)
        if self.zero:
            self.expect(packed, "zero", packed.parts["zero"], scales, ZEROS)

    def decode_rows(
        self,
        data: torch.Tensor,
        parts: Mapping[str, torch.Tensor],
        shape: Sequence[int],
        start: int,
        stop: int,
        out: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        rows, columns = rows_and_columns(shape)
        values = out.view(stop - start, columns)
        to_float32(data.view(rows, columns)[start:stop], values, scratch)
        if self.zero:
            self._apply(torch.Tensor.sub_, values, parts["zero"], shape, start)
        self._apply(torch.Tensor.mul_, values, parts["scale"], shape, start)
        if self.scb:
            values.mul_(ONE_127TH)

    def decodes_to(self, dtype: torch.dtype, parts: Mapping[str, torch.Tensor]) -> bool:
        # Every 8-bit integer is exact in float16 and bfloat16, so that only the product is rounded.
        integers = self.stored in ("int8", "uint8") and not (self.zero or self.scb)
        return dtype == torch.float32 or (integers and dtype == parts["scale"].dtype)

    def encoder(self) -> ElementEncoder | None:
        if self.stored == "uint8" or self.block[0] > 1 or (self.block[1] and not self.block[0]):
            return None  # blocks of several rows
        if self.scb or self.zero:
            return (
                ElementEncoder(self, BITSANDBYTES if self.scb else TORCHAO) if self.stored == "int8" else None
            )
        is_cast = self.stored != "int8" and self.block == (0, 0)
        return ElementEncoder(self, CAST if is_cast else OWN)

    @property
    def data_dtype(self) -> torch.dtype:
        """The dtype of `data`, which has the logical shape."""
        return STORED[self.stored]

    def _grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many blocks there are, down and across."""
        sizes = zip(rows_and_columns(shape), self.block, strict=True)
        down, across = (-(-size // block) if block else 1 for size, block in sizes)
        return down, across

    def _apply(
        self,
        operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        values: torch.Tensor,
        part: torch.Tensor,
        shape: Sequence[int],
        start: int,
    ) -> None:
        """`operation` between values [rows, columns], which begin at row `start`, and their blocks' numbers."""
        (rows, columns), (down, across) = values.shape, self._grid(shape)
        numbers = part.view(down, across)
        if self.block[0] == 1:
            numbers = numbers[start : start + rows]
        elif self.block[0]:
            numbers = repeated(numbers, self.block[0], start, start + rows)
        numbers = numbers.to(values.dtype)
        if across > 1 and columns % self.block[1] == 0:
            operation(values.view(rows, across, self.block[1]), numbers[:, :, None])
        elif across > 1:
            operation(values, numbers.repeat_interleave(self.block[1], dim=1)[:, :columns])
        else:
            operation(values, numbers)
