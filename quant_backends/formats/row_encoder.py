"""How a weight is put into a scaled format: in chunks of rows, with the arithmetic of the library it is meant for.

One format may be written in several ways: quanto, torchao and Snug all store int8 with a scale for each row, but choose
the scales and round in their own ways and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import SnugError

if TYPE_CHECKING:
    from .scaled_base import ScaledFormat
    from .scaled_elements import ScaledElements

DATA = "data"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """Encodes one weight; `kernels/dequantize.py` cuts it into chunks and joins the results along dimension 0."""

    format: Any  # a ScaledFormat, of which class the encoders say

    def rows_together(self, columns: int) -> int:
        """A chunk's rows are a multiple of this, so that no block is cut."""
        return 1

    def begin(self, matrix: torch.Tensor) -> Tensors:
        """Parts that need the whole weight (float [rows, columns]) first; they are given to every chunk."""
        return {}

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None, shared: Mapping) -> Tensors:
        """A chunk (float [rows, columns], in the weight's dtype, not to be changed) as "data" and parts.

        importance: mean square of each input channel, float32 [columns] on rows' device, or None.
        """
        raise NotImplementedError

    def finish(self, joined: Tensors) -> Tensors:
        """The tensors of the whole weight from those of its chunks and what `begin` returned."""
        return joined


def whole_groups(fmt: ScaledFormat, columns: int, size: int) -> None:
    """SnugError unless rows of so many columns are whole groups."""
    if columns % size:
        raise SnugError(
            f"Rows of {columns} weights are no whole groups of {size} as {fmt.name} has them; pick another format."
        )


@dataclass(frozen=True, slots=True)
class Rounding:
    """The arithmetic of one library for one element per weight.

    prepare: a chunk in the dtype that the library calculates in. choose: (least, largest value of each block, format)
    -> scale and, in formats that have it, zero. store: (values, parts broadcast to them, format) -> codes.
    """

    prepare: Callable[[torch.Tensor], torch.Tensor]
    choose: Callable[[torch.Tensor, torch.Tensor, ScaledElements], Tensors]
    store: Callable[[torch.Tensor, Tensors, ScaledElements], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ElementEncoder(RowEncoder):
    """One element per weight, with a scale for the tensor, each row, or each group of columns of a row."""

    format: ScaledElements
    rounding: Rounding

    def begin(self, matrix: torch.Tensor) -> Tensors:
        whole_groups(self.format, matrix.shape[1], self.format.block[1] or 1)
        if self.format.block != (0, 0):
            return {}
        low, high = (self.rounding.prepare(value).view(1, 1, 1) for value in (matrix.amin(), matrix.amax()))
        return self.rounding.choose(low, high, self.format)

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None, shared: Mapping) -> Tensors:
        count, columns = rows.shape
        group = self.format.block[1] or columns
        blocks = self.rounding.prepare(rows).reshape(count, columns // group, group)
        parts = dict(shared)
        if not parts:
            parts = self.rounding.choose(
                blocks.amin(2, keepdim=True), blocks.amax(2, keepdim=True), self.format
            )
        codes = self.rounding.store(blocks, parts, self.format)
        own = {} if shared else {name: part.view(count, -1) for name, part in parts.items()}
        return {DATA: codes.view(rows.shape), **own}

    def finish(self, joined: Tensors) -> Tensors:
        # One scale of the whole tensor has no dimensions, as float8 weights of ComfyUI have it.
        return {name: part.view(()) if part.dim() == 3 else part for name, part in joined.items()}
