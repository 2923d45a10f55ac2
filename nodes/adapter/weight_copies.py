"""Copies of packed weights, kept in memory that nobody needs: decoded, or rounded for products in 8 bits.

What a copy holds, the layer would otherwise work out in each call. It lies on its layer; the model knows them all, so
that whoever has loaded it can give the memory back.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...quant_backends.kernels.fast_matmul import RoundedWeight
from .extra_memory import count_extra
from .patches import WeightPatches

if TYPE_CHECKING:
    from .packed_module import PackedWeightModule

# Attribute of a model.
_COPIES = "snug_weight_copies"


@dataclass(frozen=True, slots=True)
class WeightCopy:
    """Of one layer's weight, on the device that calculates: either dense or rounded.

    dense: decoded in the dtype that the layer calculates in. rounded: for products in 8 bits.
    patches: what has been added to the dense one; None: nothing.
    """

    dense: torch.Tensor | None = None
    rounded: RoundedWeight | None = None
    patches: WeightPatches | None = None

    @property
    def nbytes(self) -> int:
        return sum(found.nbytes for found in (self.dense, self.rounded) if found is not None)

    def merged(self, patches: WeightPatches | None, dtype: torch.dtype) -> torch.Tensor | None:
        """The weight with these very patches in `dtype`, if it is that."""
        dense = self.dense
        return dense if dense is not None and dense.dtype == dtype and self.patches is patches else None

    def is_out_of_date(self, patches: WeightPatches | None) -> bool:
        """Whether it holds patches that the layer no longer has, or lacks those that are added to the weight itself."""
        merged = None if patches is None or patches.branch is not None else patches
        return self.dense is not None and self.patches is not merged


class Copies:
    """All copies of one model. state: what they were made for; None: to be looked at before the next call."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # which holds this: a circle would keep its memory for a while
        self._layers: list[tuple[float, PackedWeightModule]] = []
        self.state: object = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        """A copied model has none."""
        return None

    @property
    def nbytes(self) -> int:
        return sum(layer.weight_copy.nbytes for _, layer in self._layers if layer.weight_copy is not None)

    def add(self, layer: PackedWeightModule, copy: WeightCopy, value: float) -> None:
        """value: what it saves for each byte; those that save least are given back first."""
        self.drop(layer)
        layer.weight_copy = copy
        self._layers.append((value, layer))

    def drop(self, layer: PackedWeightModule) -> None:
        if layer.weight_copy is not None:
            layer.weight_copy = None
            self._layers = [entry for entry in self._layers if entry[1] is not layer]

    def drop_out_of_date(self) -> None:
        """Gives back the copies of layers whose LoRA is another one now."""
        for _, layer in list(self._layers):
            if layer.weight_copy is not None and layer.weight_copy.is_out_of_date(layer.weight_patches):
                self.drop(layer)

    def release(self, nbytes: float) -> int:
        """Gives back at least `nbytes` if there are as many; returns how many it were."""
        freed = 0
        for _, layer in sorted(self._layers, key=lambda entry: entry[0]):
            if freed >= nbytes:
                break
            if layer.weight_copy is not None:
                freed += layer.weight_copy.nbytes
            self.drop(layer)
        self.count()
        return freed

    def reconsider(self) -> None:
        """Lets the next call look whether there is memory for more of them."""
        self.state = None

    def count(self) -> None:
        """Lets ComfyUI know what they take."""
        model = self._model()
        if model is not None:
            count_extra(model, "copies", self.nbytes)


def copies_of(model: Any, make: bool = False) -> Copies | None:
    """What a model has; make: also when it has none yet."""
    found = model.__dict__.get(_COPIES)
    if found is None and make:
        found = model.__dict__[_COPIES] = Copies(model)
    return found


def release_copies(model: Any, nbytes: float = float("inf")) -> int:
    """Gives back copies of a model of at least `nbytes`, all by default; returns the bytes."""
    copies = copies_of(model)
    return 0 if copies is None else copies.release(nbytes)
