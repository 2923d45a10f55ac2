"""int8 with a scale for each row, of weights whose input channels were rotated in groups.

ComfyUI's int8_tensorwise with convrot (comfy-kitchen, TensorWiseINT8Layout)::

    data   int8, the logical shape
    scale  float32 [rows, 1]

    w = rotate(data * scale)      the rotation of `rotation.py`, which is its own inverse
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
from .rotation import rotate
from .roundings import OWN
from .row_encoder import ElementEncoder, RowEncoder, Tensors, whole_groups
from .scaled_base import FLOATS, ScaledFormat, rows_and_columns
from .scaled_elements import ScaledElements

if TYPE_CHECKING:
    from ..core.packed import PackedTensor

_NAME = re.compile(r"int8-rows-rotated-([1-9]\d{0,8})")
ROWS = ScaledElements("int8", (1, 0))


@dataclass(frozen=True, slots=True)
class RotatedRows(ScaledFormat):
    """group_size: channels that are rotated together, a power of 4 and a divisor of the columns."""

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size < 4 or 4 ** round(math.log(self.group_size, 4)) != self.group_size:
            raise SnugError(f"Groups that are rotated must be a power of 4 wide, got {self.group_size}.")

    @property
    def name(self) -> str:
        return f"int8-rows-rotated-{self.group_size}"

    @property
    def part_names(self) -> tuple[str, ...]:
        return ("scale",)

    @classmethod
    def parse(cls, name: str) -> RotatedRows | None:
        match = _NAME.fullmatch(name)
        return cls(int(match[1])) if match else None

    def check_parts(self, packed: PackedTensor) -> None:
        rows, columns = rows_and_columns(packed.shape)
        if columns % self.group_size:
            raise SnugError(
                f"A {self.name} tensor of shape {tuple(packed.shape)} is impossible: its {columns} columns are "
                f"not a multiple of the group size {self.group_size}."
            )
        self.expect(packed, "data", packed.data, rows * columns, (torch.int8,))
        self.expect(packed, "scale", packed.parts["scale"], rows, FLOATS)

    def encoder(self) -> RotatedEncoder:
        return RotatedEncoder(self)

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
        ROWS.decode_rows(data, parts, shape, start, stop, out, scratch)
        rotate(out, self.group_size, scratch.get("rotated", tuple(out.shape), torch.float32))


@dataclass(frozen=True, slots=True)
class RotatedEncoder(RowEncoder):
    """Rotates, then Snug's own int8 by row."""

    format: RotatedRows

    def begin(self, matrix: torch.Tensor) -> Tensors:
        whole_groups(self.format, matrix.shape[1], self.format.group_size)
        return {}

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None, shared: Mapping) -> Tensors:
        rotated = rows.to(torch.float32, copy=True)
        rotate(rotated, self.format.group_size, torch.empty_like(rotated))
        return ElementEncoder(ROWS, OWN).encode(rotated, importance, {})
