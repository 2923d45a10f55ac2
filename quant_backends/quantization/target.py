"""What a choice of quantization is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats import Format
from ..formats.scaled import ScaledFormat
from ..kernels.dequantize import quantize_packed
from .calibration import LayerStatistics
from .layers import LayerInfo

AnyFormat: TypeAlias = "type[Format] | ScaledFormat"
# (layer, its block's place, number of blocks) -> the format of its weight; None keeps the layer as it is.
Choose: TypeAlias = Callable[[LayerInfo, int, int], "AnyFormat | None"]
# (weight, its format, mean square of each input channel or None) -> the packed weight, where the weight is.
Encode: TypeAlias = Callable[[torch.Tensor, "AnyFormat", "torch.Tensor | None"], PackedTensor]
# The same with everything that a calibration tells of the layer's input; None for a layer that did not run.
EncodeCalibrated: TypeAlias = Callable[[torch.Tensor, "AnyFormat", "LayerStatistics | None"], PackedTensor]


@dataclass(frozen=True, slots=True)
class Target:
    """One choice of a menu.

    name: what users choose and what workflows store. backend: key of `core.backend.BACKENDS`.
    choose: which format a layer gets; encode: how a weight is put into it, with the library's own arithmetic where the
    target is named after a library. bits: per weight, of most layers, scales included.
    note: what a user should know besides, a sentence or nothing.
    calibrated: in place of encode, for a target that needs a calibration.
    unavailable: why it cannot be chosen here and what to take instead, in one sentence; empty when it can.
    """

    name: str
    backend: str
    choose: Choose
    bits: float
    encode: Encode = quantize_packed
    note: str = ""
    calibrated: EncodeCalibrated | None = None
    unavailable: str = ""

    def format_for(self, layer: LayerInfo, block: int = 0, blocks: int = 1) -> AnyFormat | None:
        """The format of a layer's weight; None: it stays as it is, as no format of the target holds its shape.

        block, blocks: as `writers.mixes.block_numbers` gives them. Raises SnugError for a target that is not available.
        """
        if self.unavailable:
            raise SnugError(self.unavailable)
        return self.choose(layer, block, blocks)


@dataclass(frozen=True, slots=True)
class SizedTargets:
    """Targets that differ in how many weights share a scale.

    name: of each, with "{}" for its size. usual: the size of the one that menus show, which is called `usual_name`.
    sizes: those that the library takes. make: (name, size) -> the target.
    """

    name: str
    usual: int
    usual_name: str
    sizes: tuple[int, ...]
    make: Callable[[str, int], Target]

    def target(self, size: int | None = None) -> Target:
        """The target of this size, the usual one for None; SnugError for a size that the library does not take."""
        size = size or self.usual
        if size not in self.sizes:
            known = ", ".join(map(str, self.sizes))
            raise SnugError(f"{self.usual_name} has no size {size} for its blocks; choose one of {known}.")
        return self.make(self.usual_name if size == self.usual else self.name.format(size), size)

    def size_in(self, name: str) -> int | None:
        """The size in a target's name; None: it is of other targets."""
        if name == self.usual_name:
            return self.usual
        before, after = map(re.escape, self.name.split("{}"))
        match = re.fullmatch(rf"{before}([1-9]\d{{0,8}}){after}", name)
        return int(match[1]) if match else None
