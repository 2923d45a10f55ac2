"""The base of scaled formats: codes in one tensor, scales in others, as the quantization libraries store them.

Unlike ggml's formats, whose blocks hold their scales, a scaled format has several tensors of its own shapes and
dtypes. It is a value: its options are fields, and its name says them all, so that the name alone can travel.
The logical weight is seen as rows of shape[0] times the product of the other dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..core.errors import SnugError
from .base import Scratch

if TYPE_CHECKING:
    from ..core.packed import PackedTensor
    from .row_encoder import RowEncoder

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """The logical shape as a matrix; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def repeated(numbers: torch.Tensor, times: int, start: int, stop: int) -> torch.Tensor:
    """numbers [n, …], each `times` times in a row; of the n * times rows those from start to stop."""
    first = start // times
    part = numbers[first : -(-stop // times)].unsqueeze(1)
    rows = part.expand(-1, times, *numbers.shape[1:]).flatten(0, 1)
    return rows[start - first * times : stop - first * times]


class ScaledFormat:
    """One way to store a weight; subclasses are frozen, slotted dataclasses. Compare and hash by value."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The format with all its options; `scaled_format(name)` gives an equal value."""
        raise NotImplementedError

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the tensors that must lie beside `data`."""
        raise NotImplementedError

    @classmethod
    def parse(cls, name: str) -> ScaledFormat | None:
        """The format of this class called `name`; None when the name is of another class."""
        raise NotImplementedError

    def check_parts(self, packed: PackedTensor) -> None:
        """Raise SnugError unless dtypes and shapes of data and of the (complete) parts fit the shape."""
        raise NotImplementedError

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
        """Decode the whole rows start..stop of the logical matrix into `out`.

        data, parts: contiguous, as `check` accepted them, all on one device; out: float32 or what `decodes_to` allows,
        contiguous, [stop - start, columns], on that device. Results are rounded only where the library rounds on its
        way.
        """
        raise NotImplementedError

    def decodes_to(self, dtype: torch.dtype, parts: Mapping[str, torch.Tensor]) -> bool:
        """Whether `decode_rows` can write this dtype itself: with the same result as from float32, in fewer passes."""
        return dtype == torch.float32

    def encoder(self) -> RowEncoder | None:
        """What puts weights into this format; None: it is only read.

        Where several libraries write the format it is Snug's own arithmetic, `roundings` has theirs.
        """
        return None

    @property
    def can_quantize(self) -> bool:
        """Whether there is an encoder."""
        return self.encoder() is not None

    def check(self, packed: PackedTensor) -> None:
        """Raise SnugError, naming the tensor at fault, unless data and parts fit this format and the shape."""
        if set(packed.parts) != set(self.part_names):
            raise SnugError(
                f"A {self.name} tensor needs the parts {', '.join(self.part_names)}, "
                f"got {', '.join(sorted(packed.parts)) or 'none'}."
            )
        for what, tensor in (("data", packed.data), *packed.parts.items()):
            if not tensor.is_contiguous() or tensor.device != packed.data.device:
                raise SnugError(
                    f"The {what} of a {self.name} tensor must be contiguous and on {packed.data.device}, "
                    f"got a {'' if tensor.is_contiguous() else 'strided '}tensor on {tensor.device}."
                )
        self.check_parts(packed)

    def expect(
        self,
        packed: PackedTensor,
        what: str,
        tensor: torch.Tensor,
        elements: int,
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        """Raise SnugError unless `tensor` has this many elements and one of these dtypes."""
        if tensor.numel() != elements or tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise SnugError(
                f"A {self.name} tensor of shape {tuple(packed.shape)} needs {elements} elements of {allowed} as "
                f"its {what}, got {tensor.numel()} of {str(tensor.dtype).removeprefix('torch.')}; the data is cut "
                f"off or belongs to another tensor."
            )
