"""A quantized tensor as it lies in a file: its codes, their format, what scales them, and the logical shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .errors import SnugError

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..formats.scaled_base import ScaledFormat


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """The stored form of one tensor, not yet decoded.

    data: for a ggml format uint8, 1-D, `format.nbytes(shape)` bytes, rows one after the other as in the file;
        for a scaled format whatever that format says.
    format: a ggml Format class, or a ScaledFormat value.
    shape: the logical shape in torch order (the quantized dimension is the last one).
    parts: a scaled format's scales and the like, by name; empty for ggml formats, whose blocks hold them.

    Raises SnugError when data and parts do not fit format and shape. Deliberately no `torch.Tensor` subclass:
    moving and slicing are explicit.
    """

    data: torch.Tensor
    format: type[Format] | ScaledFormat
    shape: tuple[int, ...]
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.format, type):
            self.format.check(self)
            return
        if self.data.dtype != torch.uint8 or self.data.dim() != 1 or self.parts:
            raise SnugError(
                f"A packed {self.format.name} tensor needs its bytes as a 1-D uint8 tensor and no parts, "
                f"got {self.data.dim()}-D {self.data.dtype} and {len(self.parts)} parts."
            )
        self.format.check_nbytes(self.data.numel(), self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the stored bytes, parts included."""
        return self.data.nbytes + sum(part.nbytes for part in self.parts.values())
