"""What kind of change each of ComfyUI's weight patches is.

A patch is (strength, value, factor of the weight, part of the weight, function on the change), see comfy.lora.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from comfy.weight_adapter import WeightAdapterBase
from comfy.weight_adapter.lora import LoRAAdapter

# What people call the adapters, by core's names of them.
_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}
# Tensors that scale the merged weight (DoRA) lie at these places of an adapter's weights.
_DORA_SCALE = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5}


class Factors(NamedTuple):
    """scale * up @ down, added to the rows and columns of the weight that begin at row and column.

    up [rows, rank], down [rank, columns], as ComfyUI holds them.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    row: int
    column: int


def low_rank_factors(patches: Sequence[Any], shape: Sequence[int]) -> list[Factors] | None:
    """The patches of a matrix of `shape` as products of two factors; None unless all of them are.

    All, as most other kinds depend on the whole weight that they are applied to.
    """
    found = [_factors(patch, shape) for patch in patches]
    return None if None in found else [factors for factors in found if factors is not None]


def _factors(patch: Any, shape: Sequence[int]) -> Factors | None:
    strength, value, weight_factor, part, function = patch
    if type(value) is not LoRAAdapter or weight_factor != 1.0 or function is not None or len(shape) != 2:
        return None
    up, down, alpha, middle, dora_scale, reshaped, *_ = value.weights
    if middle is not None or dora_scale is not None or reshaped is not None:
        return None
    sizes, starts = list(shape), [0, 0]
    if part is not None:
        dimension, start, length = part
        starts[dimension], sizes[dimension] = start, length
    up, down = up.flatten(1), down.flatten(1)
    if [up.shape[0], down.shape[1]] != sizes or up.shape[1] != down.shape[0]:
        return None  # core says what does not fit
    scale = strength if alpha is None else strength * float(alpha) / down.shape[0]
    return Factors(up, down, scale, *starts)


def kind_of(patch: Any) -> str:
    """What the patch is called in reports."""
    value = patch[1]
    if not isinstance(value, WeightAdapterBase):
        return "full difference"
    if _dora_scale(value) is not None:
        return "DoRA"
    if isinstance(value, LoRAAdapter) and value.weights[3] is not None:
        return "LoCon with a middle factor"
    return _NAMES.get(value.name, str(value.name))


def is_costly(patch: Any) -> bool:
    """Whether applying the patch takes more than one product of two factors or one sum."""
    return isinstance(patch[1], WeightAdapterBase) and kind_of(patch) != "LoRA"


def _dora_scale(adapter: Any) -> Any:
    place = _DORA_SCALE.get(adapter.name)
    return None if place is None or place >= len(adapter.weights) else adapter.weights[place]
