"""Layerwise casting: weights stored as float8, layer by layer, and decoded to the compute dtype as they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.formats.scaled import scaled_format
from ...quant_backends.formats.scaled_base import ScaledFormat
from ...quant_backends.kernels.dequantize import quantize_packed
from ...quant_backends.memory.layerwise import SkipRules, parse_skip_patterns
from .layout import is_packed, packed_tensor, unpack
from .loading import COMPUTE_DTYPES
from .reweight import reweight, reweight_clip

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
    """Chooses the new weights of a model, and counts."""

    format: ScaledFormat
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
        packed = quantize_packed(weight().to(self.device), self.format)
        home = layer.weight.device
        parts = {part: value.to(home) for part, value in packed.parts.items()}
        return PackedTensor(packed.data.to(home), packed.format, packed.shape, parts)

    def report(self, storage: str, before: int, after: int) -> str:
        kept = ", ".join(f"{count} by {pattern}" for pattern, count in self.kept.most_common())
        return "\n".join(
            (
                f"{self.cast} layers cast to {storage}",
                f"{self.kept.total()} layers kept as they were{f' ({kept})' if kept else ''}",
                f"{self.quantized} layers were quantized already",
                f"weights: {_megabytes(before)} before, {_megabytes(after)} after, {_megabytes(before - after)} saved",
            )
        )


def cast_model(patcher: Any, storage: str, compute_dtype: str, skip: str) -> tuple[Any, str]:
    """(a MODEL of its own with float8 weights, report). The given one keeps every bit.

    storage: a key of STORAGE_FORMATS; compute_dtype: of COMPUTE_DTYPES; skip: as `parse_skip_patterns` takes it.
    """
    names = [name.removeprefix(NETWORK) for name, _ in patcher.model.named_parameters()]
    rules = parse_skip_patterns(skip, names)
    casting = _Casting(scaled_format(STORAGE_FORMATS[storage]), rules, NETWORK, patcher.load_device)
    new = reweight(patcher, casting, COMPUTE_DTYPES[compute_dtype])
    return new, casting.report(storage, patcher.model_size(), new.model_size())


def cast_clip(clip: Any, storage: str, skip: str) -> tuple[Any, str]:
    """The same for a CLIP, which always calculates in float32."""
    rules = parse_skip_patterns(skip, (), is_text_encoder=True)
    casting = _Casting(scaled_format(STORAGE_FORMATS[storage]), rules, "", clip.patcher.load_device)
    new = reweight_clip(clip, casting)
    return new, casting.report(storage, clip.patcher.model_size(), new.patcher.model_size())


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
