"""Baking LoRA into quantized weights: merged in float32, quantized again in the same format, on a copy of the model."""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.kernels.requantize import can_requantize, requantize
from .core_float8 import is_plain_float8, packed_weight
from .patches import WeightPatches
from .reweight import replaceable_layers, reweight

# On a GPU: the weight before and after in float32, ComfyUI's product and its scaled copy, and what encoding takes.
_BYTES_PER_WEIGHT = 24


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

    patches: of the model, by key; shared: names of layers that share their weight with others; device: where the
    model runs. kept: counts layers whose patches stay patches, by reason.
    """

    patches: Mapping[str, list[Any]]
    shared: frozenset[str]
    device: torch.device
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
        # A GPU encodes many times faster than a CPU; devices of other kinds may not know float8.
        device = self.device if self.device.type == "cuda" else home
        original = dequantize_packed(_on(packed, device))
        merged = WeightPatches(f"{name}.weight", patches)(original.clone())
        if merged.shape != original.shape:
            self.kept["layers that a patch makes larger"] += 1
            return None
        new = requantize(merged, packed)
        rounding = dequantize_packed(new).sub_(merged)
        norms = (_squared_norm(values) for values in (merged, original.sub_(merged), rounding))
        self.baked.append(Baked(name, *norms))
        return _on(new, home)


def bake(patcher: Any) -> tuple[Any, Baking]:
    """(a MODEL of its own whose quantized weights have the LoRAs inside, what was done).

    Patches that could not be baked are still patches of the result; the given model is not changed.
    """
    make_room(patcher.model, patcher.load_device)
    baking = Baking(patcher.patches, shared_weights(patcher.model), patcher.load_device)
    new = reweight(patcher, baking)
    for layer in baking.baked:
        del new.patches[f"{layer.name}.weight"]
    new.patches_uuid = uuid.uuid4()
    return new, baking


def make_room(model: torch.nn.Module, device: torch.device) -> None:
    """Lets ComfyUI take other models off a GPU, which it fills, where the largest layer would not fit beside them."""
    if device.type == "cuda":
        largest = max((layer.weight.numel() for _, layer in replaceable_layers(model)), default=0)
        comfy.model_management.free_memory(largest * _BYTES_PER_WEIGHT, device)


def shared_weights(model: torch.nn.Module) -> frozenset[str]:
    """Names of layers whose weight is another layer's as well."""
    names: dict[int, list[str]] = {}
    for name, layer in replaceable_layers(model):
        names.setdefault(id(layer.weight), []).append(name)
    return frozenset(name for group in names.values() if len(group) > 1 for name in group)


def total(layers: Iterable[Baked]) -> Baked:
    """The layers as if they were one."""
    found = list(layers)
    sums = (math.fsum(getattr(layer, part) for layer in found) for part in ("merged", "change", "rounding"))
    return Baked("all", *sums)


def _squared_norm(values: torch.Tensor) -> float:
    return torch.linalg.vector_norm(values).item() ** 2


def _on(packed: PackedTensor, device: torch.device) -> PackedTensor:
    parts = {name: part.to(device) for name, part in packed.parts.items()}
    return PackedTensor(packed.data.to(device), packed.format, packed.shape, parts)
