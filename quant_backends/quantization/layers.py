"""The layers of a network as quantization sees them: a name, a shape, and where in the network they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from ..inspection.blocks import block_of


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer with a weight.

    name: in the network itself, without ComfyUI's prefix and without ".weight". shape: of the weight, in torch order.
    dtype: what its weight is stored in now.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["linear", "conv", "embedding"] = "linear"
    dtype: torch.dtype = torch.bfloat16

    @property
    def weights(self) -> int:
        return torch.Size(self.shape).numel()


def block_positions(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """For every layer (block, blocks): its block's place in its list from 0 up, and how many blocks the list has.

    A layer in no block is (0, 1).
    """
    found = {name: block_of(f"{name}.weight") for name in names}
    numbers: dict[str, set[int]] = {}
    for block in found.values():
        if block is not None:
            numbers.setdefault(block[0], set()).add(block[1])
    ordered = {name: sorted(members) for name, members in numbers.items()}
    return {
        name: (0, 1) if block is None else (ordered[block[0]].index(block[1]), len(ordered[block[0]]))
        for name, block in found.items()
    }
