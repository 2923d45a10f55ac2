"""bitsandbytes' LLM.int8: products in 8 bits, but for the input columns with outliers (Dettmers et al., 2022).

The weight [out, in] is that of "int8-rows-scb" (`scaled_elements`). With a threshold T, for input x [m, in]::

    outliers = |x| >= T;  columns = those with an outlier in any row
    t[i]     = largest |x[i, j]| that is no outlier
    q[i, j]  = round(x[i, j] * 127 / t[i]), 0 in columns
    y        = (q @ data.T) * t * scale / 127^2 + x[:, columns] @ w[:, columns].T
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.errors import SnugError
from .base import Scratch
from .row_encoder import RowEncoder
from .scaled_base import ScaledFormat
from .scaled_elements import ScaledElements

if TYPE_CHECKING:
    from ..core.packed import PackedTensor

WEIGHT = ScaledElements("int8", (1, 0), scb=True)
_NAME = re.compile(r"product-int8-scb-([0-9]{1,6}(?:\.[0-9]{1,6})?)")


@dataclass(frozen=True, slots=True)
class OutlierProducts(ScaledFormat):
    """threshold: inputs of at least this magnitude are outliers; 0: none are."""

    threshold: float = 6.0

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise SnugError(
                f"A threshold of outliers is a number from 0 to 999999 with six decimals, got {self.threshold}."
            )

    @property
    def name(self) -> str:
        return f"product-int8-scb-{self.number}"

    @property
    def number(self) -> str:
        """The threshold as text."""
        return f"{self.threshold:.6f}".rstrip("0").rstrip(".")

    @classmethod
    def parse(cls, name: str) -> OutlierProducts | None:
        match = _NAME.fullmatch(name)
        return cls(float(match[1])) if match else None

    @property
    def part_names(self) -> tuple[str, ...]:
        return WEIGHT.part_names

    def check_parts(self, packed: PackedTensor) -> None:
        WEIGHT.check_parts(packed)

    def decode_rows(
        self,
        data: torch.Tensor,
        parts: Mapping[str, torch.Tensor],
        shape: Sequence[int],
        start: int,
        stop: int,
        out: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        WEIGHT.decode_rows(data, parts, shape, start, stop, out, scratch)

    def encoder(self) -> RowEncoder:
        return OutlierEncoder(self)


@dataclass(frozen=True, slots=True)
class OutlierEncoder(RowEncoder):
    """bitsandbytes' own int8 by row."""

    format: OutlierProducts

    def encode(
        self, rows: torch.Tensor, importance: torch.Tensor | None, shared: Mapping
    ) -> dict[str, torch.Tensor]:
        encoder = WEIGHT.encoder()
        assert encoder is not None
        return encoder.encode(rows, importance, shared)
