"""Choosing how LoRA is applied to a MODEL with quantized weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .core_float8 import is_plain_float8, packed_float8
from .lora_bake import bake
from .lora_report import bake_report, mode_report
from .lora_settings import AUTOMATIC, BRANCH, MERGE, LoraSettings, lora_settings, set_lora_settings
from .provenance import with_recipe
from .reweight import replaceable_layers, reweight

BAKE = "bake in"
MODES = (MERGE, BRANCH, AUTOMATIC, BAKE)


def set_lora_mode(patcher: Any, mode: str, cache: bool) -> tuple[Any, str]:
    """(a MODEL that applies LoRA in the way of `mode`, report). The given one stays as it is.

    mode: of MODES; cache: whether weights with LoHa, LoKr, DoRA and the like are kept merged where memory allows.
    Only BAKE is about the LoRAs that the model has now; the others hold for later ones as well.
    """
    if mode == BAKE:
        new, baking = bake(patcher)
        with_recipe(new, {"lora_baked_layers": len(baking.baked)})
        settings = replace(lora_settings(new), mode=MERGE, cache=cache)
        report = bake_report(baking, new, settings)
    else:
        new, settings = with_packed_float8(patcher), LoraSettings(mode, cache)
        report = mode_report(new, settings)
    set_lora_settings(new, settings)
    return new, report


def with_packed_float8(patcher: Any) -> Any:
    """A clone; of a model with plain float8 weights one in which they are packed, sharing their bytes."""
    if not any(is_plain_float8(layer) for _, layer in replaceable_layers(patcher.model)):
        return patcher.clone()
    return reweight(patcher, lambda _, layer: packed_float8(layer) if is_plain_float8(layer) else None)
