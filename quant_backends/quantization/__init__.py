"""What to quantize and to what: targets that users choose, recipes that say what becomes of each layer."""

from __future__ import annotations

from .layers import LayerInfo
from .module import ModuleReport, load_packed, packed_state_dict, quantize_module
from .recipe import Recipe, make_recipe
from .target import Target
from .targets import find_target, product_targets, targets

__all__ = [
    "LayerInfo",
    "ModuleReport",
    "Recipe",
    "Target",
    "find_target",
    "load_packed",
    "make_recipe",
    "packed_state_dict",
    "product_targets",
    "quantize_module",
    "targets",
]
