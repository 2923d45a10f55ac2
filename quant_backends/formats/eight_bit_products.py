"""Weights of linear layers that are multiplied in 8 bits: the layer's input is rounded to 8 bits as well.

Layout, for a weight [out, in] of codes int8 or float8_e4m3fn::

    data    [out, in]
    scale   float32 [out] for int8; [1] for float8, one for all, as libraries and ComfyUI multiply it
    step    float32 [1]     ("-static") of the rounded input, 1 in what it is rounded from
    factor  float32 [in]    (int8: "-smooth", "-static") what each input channel is multiplied with before rounding
    shift   float32 [1]     (int8: "-static") what is added before rounding
    offset  float32 [out]   (int8: "-static") -shift * step * scale * (sum of the row's codes): takes it out again

    w = data * scale * factor * step                    (factor 1 where there is none; step where there is a factor)
    dynamic       y = (q @ data.T) * t * scale          q = round(x * factor / t), for each row of x its own
                                                        t = max |x * factor| / largest code
    static int8   y = (q @ data.T) * step * scale + offset      q = round(x * factor + shift)
    static float8 y = (q @ data.T) * step * scale               q = round(x / step)

q is clamped to +-127 for int8 and to +-448 for float8; rounding is to nearest, ties to even. Dividing large input
channels, and multiplying the weight's columns by the same, is SmoothQuant (Xiao et al., 2023); static codes with a
shift are the usual affine quantization of activations (Jacob et al., 2018). float8 has neither: its steps are as fine
for small numbers, and so it is what ComfyUI calls float8_e4m3fn with `input_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .base import Scratch
from .float8 import to_float32
from .roundings import OWN
from .row_encoder import ElementEncoder, RowEncoder, Tensors
from .scaled_base import ScaledFormat
from .scaled_elements import ScaledElements

if TYPE_CHECKING:
    from ..core.packed import PackedTensor

PREFIX = "product-"
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
_PARTS = {
    "int8": {"dynamic": (), "smooth": ("factor",), "static": ("factor", "step", "shift", "offset")},
    "float8_e4m3fn": {"dynamic": (), "static": ("step",)},
}


@dataclass(frozen=True, slots=True)
class EightBitProducts(ScaledFormat):
    """stored: "int8" or "float8_e4m3fn"; activations: "dynamic", "static" or "smooth" (int8, dynamic with a factor)."""

    stored: str
    activations: str = "dynamic"

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.stored}-{self.activations}"

    @classmethod
    def parse(cls, name: str) -> EightBitProducts | None:
        stored, _, activations = name.removeprefix(PREFIX).partition("-")
        if not name.startswith(PREFIX) or activations not in _PARTS.get(stored, {}):
            return None
        return cls(stored, activations)

    @property
    def part_names(self) -> tuple[str, ...]:
        return ("scale", *_PARTS[self.stored][self.activations])

    @property
    def data_dtype(self) -> torch.dtype:
        return getattr(torch, self.stored)

    @property
    def largest(self) -> float:
        """The largest code."""
        return LARGEST[self.stored]

    def check_parts(self, packed: PackedTensor) -> None:
        shape = packed.shape
        self.expect(packed, "data", packed.data, math.prod(shape), (self.data_dtype,))
        rows, columns = shape if len(shape) == 2 else (-1, -1)
        scales = rows if self.stored == "int8" else 1
        sizes = {"scale": scales, "factor": columns, "step": 1, "shift": 1, "offset": rows}
        for name, part in packed.parts.items():
            self.expect(packed, name, part, sizes[name], (torch.float32,))

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
        values = out.view(stop - start, shape[1])
        to_float32(data.view(*shape)[start:stop], values, scratch)
        scale = parts["scale"].view(-1, 1)
        values.mul_(scale if self.stored != "int8" else scale[start:stop])
        if "factor" in parts:
            values.mul_(parts["factor"] if "step" not in parts else parts["factor"] * parts["step"])

    def encoder(self) -> ProductEncoder | None:
        """Of what needs nothing but the weight; `quantization.activations` makes the other kinds."""
        return ProductEncoder(self) if self.activations == "dynamic" else None

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """values (float32, overwritten) as codes."""
        if self.stored == "int8":
            values = values.round_()
        return values.clamp_(-self.largest, self.largest).to(self.data_dtype)


def shift_offset(data: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The part "offset", float32 [out], of a static int8 weight [out, in] with these other parts."""
    return -parts["shift"] * parts["step"] * parts["scale"] * data.sum(1, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class ProductEncoder(RowEncoder):
    """The codes and scales of Snug's own rounding: by row for int8, of the whole for float8."""

    format: EightBitProducts

    def begin(self, matrix: torch.Tensor) -> Tensors:
        return self._elements().begin(matrix)

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None, shared: Mapping) -> Tensors:
        return self._elements().encode(rows, importance, shared)

    def finish(self, joined: Tensors) -> Tensors:
        return {**joined, "scale": joined["scale"].view(-1)}

    def _elements(self) -> ElementEncoder:
        block = (1, 0) if self.format.stored == "int8" else (0, 0)
        return ElementEncoder(ScaledElements(self.format.stored, block), OWN)
