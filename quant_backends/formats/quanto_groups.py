"""quanto's qint4 and qint2: unsigned codes in groups, each with a scale and a shift.

Layout (optimum.quanto.tensor.packed.pack_weights over tensor.grouped.group with axis 0)::

    data   uint8 [ceil(groups / n), group size]     n = 8 / bits; group g lies in row g % len(data),
                                                    bits from bits * (g // len(data)) up
    scale  float [groups]
    shift  like scale, or an integer; any shape of as many elements

    w = scale * code - shift      float shift; quanto rounds the product to scale's dtype before it subtracts
    w = scale * (code - shift)    integer shift
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.errors import SnugError
from .base import Scratch
from .group_encoder import GroupEncoder
from .scaled_base import FLOATS, ScaledFormat, rows_and_columns

if TYPE_CHECKING:
    from ..core.packed import PackedTensor

_NAME = re.compile(r"quanto-int([24])-([1-9]\d{0,8})")


@dataclass(frozen=True, slots=True)
class QuantoGroups(ScaledFormat):
    """bits: 4 or 2; group_size: weights per scale, a divisor of the columns."""

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        return f"quanto-int{self.bits}-{self.group_size}"

    @property
    def part_names(self) -> tuple[str, ...]:
        return ("scale", "shift")

    @classmethod
    def parse(cls, name: str) -> QuantoGroups | None:
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2])) if match else None

    def check_parts(self, packed: PackedTensor) -> None:
        _, columns = rows_and_columns(packed.shape)
        if columns % self.group_size:
            raise SnugError(
                f"A {self.name} tensor of shape {tuple(packed.shape)} is impossible: its {columns} columns are "
                f"not a multiple of the group size {self.group_size}."
            )
        groups = math.prod(packed.shape) // self.group_size
        stored = -(-groups // (8 // self.bits)) * self.group_size
        self.expect(packed, "data", packed.data, stored, (torch.uint8,))
        self.expect(packed, "scale", packed.parts["scale"], groups, FLOATS)
        self.expect(packed, "shift", packed.parts["shift"], groups, (torch.int8, torch.uint8, *FLOATS))

    def encoder(self) -> GroupEncoder:
        return GroupEncoder(self)

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
        _, columns = rows_and_columns(shape)
        begin, end = start * columns // self.group_size, stop * columns // self.group_size
        packed = data.view(-1, self.group_size)
        codes = scratch.get("codes", (end - begin, self.group_size), torch.uint8)
        for plane in range(8 // self.bits):
            origin = plane * len(packed)
            low, high = max(begin, origin), min(end, origin + len(packed))
            if low < high:
                place = codes[low - begin : high - begin]
                torch.bitwise_right_shift(packed[low - origin : high - origin], plane * self.bits, out=place)
        codes.bitwise_and_((1 << self.bits) - 1)
        scale, shift = (parts[name].view(-1, 1)[begin:end] for name in ("scale", "shift"))
        values = out.view(-1, self.group_size).copy_(codes)
        if not shift.dtype.is_floating_point:
            values.sub_(shift.float()).mul_(scale.float())
            return
        values.mul_(scale.to(out.dtype))
        if scale.dtype != out.dtype:
            values.copy_(scratch.get("product", tuple(values.shape), scale.dtype).copy_(values))
        values.sub_(shift.to(out.dtype))

    def decodes_to(self, dtype: torch.dtype, parts: Mapping[str, torch.Tensor]) -> bool:
        return dtype == torch.float32 or all(part.dtype == dtype for part in parts.values())
