"""Layers of plain torch whose weight is packed: what `quantize_module` makes of Linear, convolutions and Embedding.

They are the old layers with another class, so that names, hooks and whatever refers to them stay. The codes and what
scales them are buffers: they move, copy and are saved with the module, and never change their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..core.packed import PackedTensor
from ..formats.scaled import format_called
from ..kernels.dequantize import dequantize_packed
from ..kernels.embedding import embedding
from ..kernels.linear import linear

PREFIX = "weight_"
DATA = f"{PREFIX}data"


class PackedWeight(torch.nn.Module):
    """Mixin of the layers below.

    packed_format, packed_shape, packed_dtype: the format's name, the logical shape, and the dtype that `weight` has.
    """

    packed_format: str
    packed_shape: tuple[int, ...]
    packed_dtype: torch.dtype

    @property
    def packed(self) -> PackedTensor:
        """The weight as it is stored, where it is."""
        parts = {
            name.removeprefix(PREFIX): self._buffers[name] for name in self._packed_buffers() if name != DATA
        }
        data = self._buffers[DATA]
        return PackedTensor(data, format_called(self.packed_format), self.packed_shape, parts)  # pyright: ignore

    @property
    def weight(self) -> torch.Tensor:
        """The weight decoded, anew each time: for code that looks at it. The layer itself does not use this."""
        return dequantize_packed(self.packed, self.packed_dtype)

    def set_packed(self, packed: PackedTensor, dtype: torch.dtype) -> None:
        """Puts a weight into the layer in place of the one that it has."""
        for name in self._packed_buffers():
            del self._buffers[name]
        self.packed_format, self.packed_shape = packed.format.name, tuple(packed.shape)
        self.packed_dtype = dtype
        self.register_buffer(DATA, packed.data)
        for name, part in packed.parts.items():
            self.register_buffer(PREFIX + name, part)

    def _packed_buffers(self) -> list[str]:
        return [name for name in self._buffers if name.startswith(PREFIX)]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves the packed weight with the rest; `half()` and the like change what it decodes to, not the codes."""
        kept = {name: self._buffers.pop(name) for name in self._packed_buffers()}
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.packed_dtype, device=kept[DATA].device))  # pyright: ignore
        self.packed_dtype = probe.dtype
        for name, value in kept.items():
            self._buffers[name] = value.to(probe.device)  # pyright: ignore
        return self


class PackedLinear(PackedWeight, torch.nn.Linear):
    """y = x W^T + b, the weight decoded as it is needed (kernels/linear.py)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.packed, self.bias)


class PackedConv1d(PackedWeight, torch.nn.Conv1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, dequantize_packed(self.packed, input.dtype), self.bias)


class PackedConv2d(PackedWeight, torch.nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, dequantize_packed(self.packed, input.dtype), self.bias)


class PackedConv3d(PackedWeight, torch.nn.Conv3d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, dequantize_packed(self.packed, input.dtype), self.bias)


class PackedEmbedding(PackedWeight, torch.nn.Embedding):
    """Only the rows that are looked up are decoded, in formats that store rows one after the other."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = embedding(input, self.packed, self.packed_dtype)
        return F.embedding(input, self.weight) if rows is None else rows


# The kinds of layers as recipes call them, and what takes their place. Layers that are derived from these may use the
# weight in ways of their own, and stay.
KINDS: dict[type[torch.nn.Module], tuple[str, type[PackedWeight]]] = {
    torch.nn.Linear: ("linear", PackedLinear),
    torch.nn.Conv1d: ("conv", PackedConv1d),
    torch.nn.Conv2d: ("conv", PackedConv2d),
    torch.nn.Conv3d: ("conv", PackedConv3d),
    torch.nn.Embedding: ("embedding", PackedEmbedding),
}


def pack_layer(layer: torch.nn.Module, packed: PackedTensor, dtype: torch.dtype) -> None:
    """Makes a layer of KINDS, or one that is packed already, one with this weight, in place."""
    if not isinstance(layer, PackedWeight):
        layer.__class__ = KINDS[type(layer)][1]
        del layer._parameters["weight"]
    assert isinstance(layer, PackedWeight)
    layer.set_packed(packed, dtype)
