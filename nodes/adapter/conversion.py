"""Choosing new weights for the layers of a model: what layerwise casting and quantizing have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import comfy.model_management
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.quantization import LayerInfo
from .core_float8 import is_plain_float8, packed_float8
from .layout import DENSE, is_packed, moved, packed_tensor
from .patches import WeightPatches
from .reweight import replaceable_layers

NETWORK = "diffusion_model."
# On a GPU: the weight before and after in float32, ComfyUI's product and its scaled copy, and what encoding takes.
_BYTES_PER_WEIGHT = 24


@dataclass
class Conversion:
    """Chooses the new weights of a model for `reweight`, and counts.

    done: what happens to a layer, for the report: "cast to float8". reason: why a layer stays as it is, None to convert
    it; convert: its weight (float, on the device that calculates) to the new one. prefix: of the network's names in
    the model. device: where to calculate, None for where a weight is. patches: merged into a weight before it is
    converted, by key; shared: names of layers whose weight is another layer's as well. again: decode and convert what
    is quantized. The rest counts: formats that layers got, layers kept by reason, layers that were quantized, and keys
    whose patches are in the weights now.
    """

    done: str
    reason: Callable[[LayerInfo], str | None]
    convert: Callable[[LayerInfo, torch.Tensor], PackedTensor]
    prefix: str
    device: torch.device | None = None
    patches: Mapping[str, list[Any]] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    again: bool = False
    formats: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    quantized: int = 0
    fused: list[str] = field(default_factory=list)

    def __call__(self, name: str, layer: Any) -> PackedTensor | None:
        if not name.startswith(self.prefix):
            return None
        decode = _decoder(layer, self.again)
        if decode is None:
            self.quantized += 1
            return None
        info = layer_info(name.removeprefix(self.prefix), layer)
        reason = self.reason(info)
        if reason is not None:
            self.kept[reason] += 1
            return None
        home = layer.weight.device
        weight, is_fused = self._merged(name, decode(self.device or home))
        if is_fused:
            self.fused.append(f"{name}.weight")
        packed = self.convert(info, weight)
        self.formats[packed.format.name] += 1
        return moved(packed, home)

    def converts(self, layer: Any) -> bool:
        """Whether the layer's weight is converted unless there is a reason not to."""
        return _decoder(layer, self.again) is not None

    def weight(self, name: str, layer: Any) -> torch.Tensor:
        """What would be converted of a layer that is; name: in the model."""
        decode = _decoder(layer, self.again)
        assert decode is not None
        return self._merged(name, decode(self.device or layer.weight.device))[0]

    def _merged(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """(the weight with its patches where they can be merged, whether they are)."""
        patches = self.patches.get(f"{name}.weight")
        if not patches or name in self.shared:
            return weight, False
        merged = WeightPatches(f"{name}.weight", patches)(weight.to(torch.float32, copy=True))
        return (merged, True) if merged.shape == weight.shape else (weight, False)

    def report(self, patcher: Any, new: Any) -> str:
        """Counts, reasons and bytes; patcher: what came in, new: what came out."""
        reasons = ", ".join(f"{count} by {pattern}" for pattern, count in self.kept.most_common())
        before, after = patcher.model_size(), new.model_size()
        lines = [f"{self.formats.total()} layers {self.done}"]
        if len(self.formats) > 1:
            lines += [f"  {count} in {name}" for name, count in self.formats.most_common()]
        lines.append(
            f"{self.kept.total()} layers kept as they were{f' ({reasons})' if reasons else ''}",
        )
        lines.append(f"{self.quantized} layers were quantized already")
        others = self._other_layers(new.model)
        if others:
            lines.append(f"{others} layers of other kinds were left alone")
        if self.fused:
            lines.append(f"LoRA is in the weights of {len(self.fused)} layers now")
        lines.append(
            f"weights: {_megabytes(before)} before, {_megabytes(after)} after, {_megabytes(before - after)} saved"
        )
        return "\n".join(lines)

    def _other_layers(self, model: torch.nn.Module) -> int:
        """Layers that cannot hold a packed weight: of a kind that Snug does not know, or of another pack."""
        known = {id(layer) for _, layer in replaceable_layers(model)}
        weights = (
            getattr(module, "weight", None)
            for name, module in model.named_modules()
            if name.startswith(self.prefix) and id(module) not in known
        )
        return sum(isinstance(weight, torch.Tensor) and weight.dim() > 1 for weight in weights)


def layer_info(name: str, layer: Any) -> LayerInfo:
    """The layer as quantization sees it; name: without ComfyUI's prefix."""
    return LayerInfo(name, tuple(layer.weight.shape), _kind(layer), layer.weight.dtype)


def _kind(layer: Any) -> Literal["linear", "conv", "embedding", "experts"]:
    kind = type(layer).__name__
    if kind == "MoEExperts":
        return "experts"
    if kind.startswith("Conv"):
        return "conv"
    return "embedding" if kind == "Embedding" else "linear"


def encoding_device(patcher: Any) -> torch.device | None:
    """Where to encode the weights of a model; None for where they are.

    A GPU encodes many times faster than a CPU; devices of other kinds may not know every number format.
    """
    return patcher.load_device if patcher.load_device.type == "cuda" else None


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


def _decoder(layer: Any, again: bool) -> Callable[[torch.device], torch.Tensor] | None:
    """What gives the weight of a layer as a plain tensor on a device; None for quantized ones that are to stay.

    again: whether quantized weights are decoded; those that only ComfyUI decodes stay where it cannot do it here.
    """
    weight = layer.weight
    if is_packed(weight):
        fmt = packed_tensor(weight).format
        plain = isinstance(fmt, type) and fmt.dtype is not None and fmt.dtype in DENSE
        return (
            (lambda device: dequantize_packed(moved(packed_tensor(weight), device)))
            if plain or again
            else None
        )
    if type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.dtype in DENSE:
        return lambda device: weight.detach().to(device)
    if again and is_plain_float8(layer):
        return lambda device: dequantize_packed(moved(packed_float8(layer), device))
    if again and isinstance(weight, QuantizedTensor):  # core's own
        return lambda device: weight.to(device).dequantize().float()
    return None


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MB"
