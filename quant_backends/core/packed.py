"""A quantized tensor as it lies in a file: raw block bytes, their format and the logical shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import SnugError

if TYPE_CHECKING:
    from ..formats.base import Format


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """Block bytes of one tensor, not yet decoded.

    data: uint8, 1-D, `format.nbytes(shape)` bytes, rows one after the other as in the file.
    shape: the logical shape in torch order (the quantized dimension is the last one).

    Raises SnugError when the bytes do not fit the shape. Deliberately no `torch.Tensor` subclass: moving and
    slicing are explicit.
    """

    data: torch.Tensor
    format: type[Format]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.data.dtype != torch.uint8 or self.data.dim() != 1:
            raise SnugError(
                f"A packed {self.format.name} tensor needs its bytes as a 1-D uint8 tensor, "
                f"got {self.data.dim()}-D {self.data.dtype}."
            )
        self.format.check_nbytes(self.data.numel(), self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the packed bytes."""
        return self.data.numel()
