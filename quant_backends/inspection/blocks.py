"""The blocks of a model by the names of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .stored import StoredWeight

# A member of a numbered list that is more than one layer: there are at least a layer and a parameter behind its
# number, however many numbers the layer's place in it has.
_BLOCK = re.compile(r"(.+?)\.(\d+)\.(?:\d+\.)*[A-Za-z_]\w*\..+")
# What is in no block.
OTHERS = "others"


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Blocks of one list, or everything that is in none (name OTHERS). blocks: bytes of each, in the order of their
    first weights; one entry for OTHERS."""

    name: str
    tensors: int
    weights: int
    blocks: tuple[tuple[str, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.blocks)


def group_blocks(weights: Iterable[StoredWeight]) -> list[BlockGroup]:
    """The lists of blocks of a model in the order of their first weights; what is in no block comes last."""
    lists: dict[str, dict[str, list[StoredWeight]]] = {}
    for weight in weights:
        match = _BLOCK.fullmatch(weight.name)
        name, block = (match[1], f"{match[1]}.{match[2]}") if match else (OTHERS, OTHERS)
        lists.setdefault(name, {}).setdefault(block, []).append(weight)
    groups = []
    for name, blocks in sorted(lists.items(), key=lambda item: item[0] == OTHERS):
        members = [weight for found in blocks.values() for weight in found]
        sizes = {block: sum(weight.nbytes for weight in found) for block, found in blocks.items()}
        ordered = sorted(sizes.items(), key=lambda item: _number(item[0]))
        groups.append(
            BlockGroup(name, len(members), sum(weight.weights for weight in members), tuple(ordered))
        )
    return groups


def _number(block: str) -> int:
    end = block.rpartition(".")[2]
    return int(end) if end.isdecimal() else 0
