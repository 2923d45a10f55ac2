"""quanto's qint4 and qint2: MaxOptimizer, quantize_affine and pack_weights of optimum-quanto, bit for bit.

All of it in the weight's own dtype: the range of a group is spread over the codes, and the shift is its least value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .row_encoder import DATA, RowEncoder, Tensors, whole_groups

if TYPE_CHECKING:
    from .quanto_groups import QuantoGroups


@dataclass(frozen=True, slots=True)
class GroupEncoder(RowEncoder):
    """Codes are kept a byte each until all are there: groups share bytes with ones far away."""

    format: QuantoGroups

    def begin(self, matrix: torch.Tensor) -> Tensors:
        whole_groups(self.format, matrix.shape[1], self.format.group_size)
        return {}

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None, shared: Mapping) -> Tensors:
        groups = rows.reshape(-1, self.format.group_size)
        least, largest = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        levels = (1 << self.format.bits) - 1
        scale, shift = (largest - least) / levels, -least
        codes = ((groups + shift) / scale).round_()
        # In a group of equal numbers all are 0 / 0; whatever the code, it stands for minus the shift.
        codes = codes.nan_to_num_(0.0).clamp_(0, levels).to(torch.uint8)
        return {DATA: codes, "scale": scale, "shift": shift}

    def finish(self, joined: Tensors) -> Tensors:
        return joined | {DATA: pack_planes(joined[DATA], self.format.bits)}


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [groups, size] to uint8 [rows, size], 8 / bits codes a byte: group g lies in row g % rows, from the bit
    bits * (g // rows) up.
    """
    count = 8 // bits
    rows = -(-len(codes) // count)
    packed = codes.new_zeros(rows, codes.shape[1])
    for plane, part in enumerate(codes.split(rows)):
        packed[: len(part)] |= part << plane * bits
    return packed
