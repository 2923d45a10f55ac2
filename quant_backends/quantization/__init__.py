"""What to quantize and to what: targets that users choose, recipes that say what becomes of each layer."""

from __future__ import annotations

from .layers import LayerInfo
from .recipe import Recipe, make_recipe
from .target import Target
from .targets import find_target, targets

__all__ = ["LayerInfo", "Recipe", "Target", "find_target", "make_recipe", "targets"]
