"""Baking LoRA into quantized weights: merged in float32, quantized again in the same format, on a copy of the model."""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.kernels.requantize import can_requantize, requantize
from .conversion import encoding_device, make_room, shared_weights
from .core_float8 import is_plain_float8, packed_weight
from .layout import moved
from .patches import WeightPatches
from .reweight import reweight


@dataclass(frozen=True)
class Baked:
    """Squared norms of one layer: the merged weight, the LoRA's change in it, and what rounding their sum changed."""

    name: str
    merged: float
    change: float
    rounding: float


@dataclass
class Baking:
    """Chooses the new weights of a model for `reweight`, and keeps account.

    patches: of the model, by key; shared: names of layers that share their weight with others; device: where to
    calculate, None for where a weight is. kept: counts layers whose patches stay patches, by reason.
    """

    patches: Mapping[str, list[Any]]
    shared: frozenset[str]
    device: torch.device | None
    baked: list[Baked] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)

    def __call__(self, name: str, layer: Any) -> PackedTensor | None:
        packed = packed_weight(layer)
        if packed is None:
            return None
        patches = self.patches.get(f"{name}.weight")
        new = None
        if patches and name in self.shared:
            self.kept["layers that share one weight"] += 1
        elif patches and not can_requantize(packed):
            self.kept[f"layers in {packed.format.name}, which Snug reads but does not write"] += 1
        elif patches:
            new = self._bake(name, packed, patches)
        return new or (packed if is_plain_float8(layer) else None)

    def _bake(self, name: str, packed: PackedTensor, patches: list[Any]) -> PackedTensor | None:
        home = packed.data.device
        device = self.device or home
        original = dequantize_packed(moved(packed, device))
        merged = WeightPatches(f"{name}.weight", patches)(original.clone())
        if merged.shape != original.shape:
            self.kept["layers that a patch makes larger"] += 1
            return None
        new = requantize(merged, packed)
        rounding = dequantize_packed(new).sub_(merged)
        norms = (_squared_norm(values) for values in (merged, original.sub_(merged), rounding))
        self.baked.append(Baked(name, *norms))
        return moved(new, home)


def bake(patcher: Any) -> tuple[Any, Baking]:
    """(a MODEL of its own whose quantized weights have the LoRAs inside, what was done).

    Patches that could not be baked are still patches of the result; the given model is not changed.
    """
    make_room(patcher.model, patcher.load_device)
    baking = Baking(patcher.patches, shared_weights(patcher.model), encoding_device(patcher))
    new = reweight(patcher, baking)
    for layer in baking.baked:
        del new.patches[f"{layer.name}.weight"]
    new.patches_uuid = uuid.uuid4()
    return new, baking


def total(layers: Iterable[Baked]) -> Baked:
    """The layers as if they were one."""
    found = list(layers)
    sums = (math.fsum(getattr(layer, part) for layer in found) for part in ("merged", "change", "rounding"))
    return Baked("all", *sums)


def _squared_norm(values: torch.Tensor) -> float:
    return torch.linalg.vector_norm(values).item() ** 2
