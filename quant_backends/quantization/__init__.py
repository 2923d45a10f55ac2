"""What to quantize and to what: targets that users choose, recipes that say what becomes of each layer."""

from __future__ import annotations

from .layers import LayerInfo, block_positions
from .recipe import Recipe, make_recipe
from .targets import Target, find_target, targets

__all__ = ["LayerInfo", "Recipe", "Target", "block_positions", "find_target", "make_recipe", "targets"]
