"""Layerwise casting: weights stored as float8, layer by layer, and decoded to the compute dtype as they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.formats.scaled import scaled_format
from ...quant_backends.kernels.dequantize import quantize_packed
from ...quant_backends.memory.layerwise import SkipRules, parse_skip_patterns
from .layout import is_packed, packed_tensor, unpack
from .loading import COMPUTE_DTYPES
from .reweight import replaceable_layers, reweight, reweight_clip

# What the nodes offer: float8 with one scale for each row of a weight, or none.
STORAGE_FORMATS = {
    "float8_e4m3fn per row": "float8_e4m3fn-rows",
    "float8_e4m3fn": "float8_e4m3fn-tensor",
    "float8_e5m2 per row": "float8_e5m2-rows",
    "float8_e5m2": "float8_e5m2-tensor",
}
DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NETWORK = "diffusion_model."


@dataclass
class _Casting:
    """Chooses the new weights of a model, and counts.

    storage: a key of STORAGE_FORMATS; prefix: of the network's names; device: where the model runs.
    """

    storage: str
    rules: SkipRules
    prefix: str
    device: torch.device
    cast: int = 0
    quantized: int = 0
    kept: Counter[str] = field(default_factory=Counter)

    def __call__(self, name: str, layer: Any) -> PackedTensor | None:
        if not name.startswith(self.prefix):
            return None
        weight = _dense(layer.weight)
        if weight is None:
            self.quantized += 1
            return None
        reason = self.rules.reason(name.removeprefix(self.prefix))
        if reason is not None:
            self.kept[reason] += 1
            return None
        self.cast += 1
        home = layer.weight.device
        # A GPU encodes many times faster than a CPU; devices of other kinds may not know float8.
        device = self.device if self.device.type == "cuda" else home
        packed = quantize_packed(weight().to(device), scaled_format(STORAGE_FORMATS[self.storage]))
        parts = {part: value.to(home) for part, value in packed.parts.items()}
        return PackedTensor(packed.data.to(home), packed.format, packed.shape, parts)

    def report(self, patcher: Any, new: Any) -> str:
        reasons = ", ".join(f"{count} by {pattern}" for pattern, count in self.kept.most_common())
        before, after = patcher.model_size(), new.model_size()
        lines = [
            f"{self.cast} layers cast to {self.storage}",
            f"{self.kept.total()} layers kept as they were{f' ({reasons})' if reasons else ''}",
            f"{self.quantized} layers were quantized already",
            f"weights: {_megabytes(before)} before, {_megabytes(after)} after, {_megabytes(before - after)} saved",
        ]
        others = self._other_layers(new.model)
        if others:
            lines.insert(3, f"{others} layers of other kinds were left alone")
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


def cast_model(patcher: Any, storage: str, compute_dtype: str, skip: str) -> tuple[Any, str]:
    """(a MODEL of its own with float8 weights, report). The given one keeps every bit.

    storage: a key of STORAGE_FORMATS; compute_dtype: of COMPUTE_DTYPES; skip: as `parse_skip_patterns` takes it.
    """
    names = [name.removeprefix(NETWORK) for name, _ in patcher.model.named_parameters()]
    casting = _Casting(storage, parse_skip_patterns(skip, names), NETWORK, patcher.load_device)
    new = reweight(patcher, casting, COMPUTE_DTYPES[compute_dtype])
    return new, casting.report(patcher, new)


def cast_clip(clip: Any, storage: str, skip: str) -> tuple[Any, str]:
    """The same for a CLIP, which always calculates in float32."""
    rules = parse_skip_patterns(skip, (), is_text_encoder=True)
    casting = _Casting(storage, rules, "", clip.patcher.load_device)
    new = reweight_clip(clip, casting)
    return new, casting.report(clip.patcher, new.patcher)


def _dense(weight: Any) -> Callable[[], torch.Tensor] | None:
    """What gives the weight as a plain tensor; None for weights that are quantized."""
    if is_packed(weight):
        fmt = packed_tensor(weight).format
        plain = isinstance(fmt, type) and fmt.dtype is not None and fmt.dtype in DENSE
        return (lambda: unpack(weight, torch.float32)) if plain else None
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.dtype not in DENSE:
        return None
    return lambda: weight.detach()


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MB"
