"""Layerwise casting: weights stored as float8, layer by layer, and decoded to the compute dtype as they are used."""

from __future__ import annotations

from typing import Any

from ...quant_backends.formats.scaled import scaled_format
from ...quant_backends.kernels.dequantize import quantize_packed
from ...quant_backends.memory.layerwise import SkipRules, parse_skip_patterns
from .conversion import NETWORK, Conversion, encoding_device
from .loading import COMPUTE_DTYPES
from .provenance import with_recipe
from .reweight import reweight, reweight_clip

# What the nodes offer: float8 with one scale for each row of a weight, or none.
STORAGE_FORMATS = {
    "float8_e4m3fn per row": "float8_e4m3fn-rows",
    "float8_e4m3fn": "float8_e4m3fn-tensor",
    "float8_e5m2 per row": "float8_e5m2-rows",
    "float8_e5m2": "float8_e5m2-tensor",
}


def cast_model(patcher: Any, storage: str, compute_dtype: str, skip: str) -> tuple[Any, str]:
    """(a MODEL of its own with float8 weights, report). The given one keeps every bit.

    storage: a key of STORAGE_FORMATS; compute_dtype: of COMPUTE_DTYPES; skip: as `parse_skip_patterns` takes it.
    """
    names = [name.removeprefix(NETWORK) for name, _ in patcher.model.named_parameters()]
    casting = _casting(storage, parse_skip_patterns(skip, names), NETWORK, patcher)
    new = reweight(patcher, casting, COMPUTE_DTYPES[compute_dtype])
    with_recipe(new, _recipe(storage, casting))
    return new, casting.report(patcher, new)


def cast_clip(clip: Any, storage: str, skip: str) -> tuple[Any, str]:
    """The same for a CLIP, which always calculates in float32."""
    casting = _casting(storage, parse_skip_patterns(skip, (), is_text_encoder=True), "", clip.patcher)
    new = reweight_clip(clip, casting)
    with_recipe(new.patcher, _recipe(storage, casting))
    return new, casting.report(clip.patcher, new.patcher)


def _recipe(storage: str, casting: Conversion) -> dict[str, Any]:
    """For what is said of the weights' origin in files."""
    return {"target": f"layerwise casting to {storage}", "backend": "fp8", "layers": casting.formats.total()}


def _casting(storage: str, rules: SkipRules, prefix: str, patcher: Any) -> Conversion:
    fmt = scaled_format(STORAGE_FORMATS[storage])
    return Conversion(
        f"cast to {storage}",
        lambda layer: rules.reason(layer.name),
        lambda _, weight: quantize_packed(weight, fmt),
        prefix,
        encoding_device(patcher),
    )
