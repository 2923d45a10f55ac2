"""What the conventions' writers share: the weights of a file as they see them, and names."""

from __future__ import annotations

from typing import TypeAlias

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats import Format
from ..formats.scaled import ScaledElements, ScaledFormat

Tensors: TypeAlias = "dict[str, torch.Tensor]"
AnyFormat: TypeAlias = "type[Format] | ScaledFormat"
WHOLE = ((0, 0), (1, 0))
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


class Stored:
    """What is left to know of a weight when its data is written: its format, shape and dtype, and whether zero points
    are all zero."""

    def __init__(self, packed: PackedTensor, dtype: torch.dtype) -> None:
        self.format, self.shape, self.dtype = packed.format, tuple(packed.shape), dtype
        self.scale_dtype = packed.parts["scale"].dtype if "scale" in packed.parts else dtype
        zero = packed.parts.get("zero")
        self.is_symmetric = zero is None or not bool(zero.any())


def layer_of(name: str) -> str:
    """What "….weight" is the weight of; SnugError for other names, where nothing can stand beside the weight."""
    if not name.endswith(".weight"):
        raise SnugError(f"{name} is quantized, but only weights whose names end in .weight can be stored so.")
    return name.removesuffix(".weight")


def is_elements(fmt: AnyFormat, stored: tuple[str, ...], blocks: tuple[tuple[int, int], ...]) -> bool:
    """Whether a format is one element per weight of a dtype in `stored`, with a scale for one of these blocks."""
    if not isinstance(fmt, ScaledElements) or fmt.zero or fmt.scb:
        return False
    return fmt.stored in stored and fmt.block in blocks
