"""Which weights to keep decoded in memory that is left over: those whose decoding costs most for each byte kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..formats import Format
from ..formats.scaled_base import ScaledFormat

# Decoding a weight, relative to Q8_0 (benchmarks/results/dequantize-cpu.md): only their order matters.
_COSTS = {
    "F32": 0.6,
    "F16": 0.7,
    "BF16": 0.7,
    "Q8_0": 1.0,
    "Q1_0": 1.0,
    "TQ2_0": 1.1,
    "Q4_0": 1.3,
    "Q2_K": 1.5,
    "Q4_1": 1.5,
    "Q3_K": 1.9,
    "Q5_0": 2.1,
    "Q5_1": 2.3,
    "Q5_K": 2.3,
    "IQ3_S": 2.0,
    "IQ4_XS": 2.2,
}
_GGML, _SCALED = 1.6, 1.2
# Adding patches in float32 as well; rotating and rounding to 8 bits as well.
MERGING, ROUNDING = 4.0, 4.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """nbytes: what its copy takes; value: what the copy saves in each call, for each byte."""

    nbytes: int
    value: float


Kind = TypeVar("Kind", bound=Candidate)


def decoding_cost(fmt: type[Format] | ScaledFormat) -> float:
    """Of a weight, relative to Q8_0."""
    return _COSTS.get(fmt.name, _GGML) if isinstance(fmt, type) else _SCALED


def choose(candidates: Sequence[Kind], room: float) -> list[Kind]:
    """Those of the highest value that fit into `room` bytes together; of equal ones the first."""
    chosen: list[Kind] = []
    for candidate in sorted(candidates, key=lambda found: -found.value):
        if candidate.nbytes <= room:
            chosen.append(candidate)
            room -= candidate.nbytes
    return chosen
