"""Why each weight of a model is in the format that it is in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..formats import FORMATS
from ..writers.plan import MAX_SMALL
from ..writers.precision import RULES, PrecisionRules
from .stored import StoredWeight

# Names given as examples of a choice.
EXAMPLES = 3
# Bits per weight from which a format is called plain: nothing is saved by it.
_PLAIN_BITS = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """Weights in one format for one reason. is_island: whether they are more precise than most of the model."""

    format: str
    reason: str
    is_island: bool
    tensors: int
    weights: int
    nbytes: int
    examples: tuple[str, ...]


def main_format(weights: Iterable[StoredWeight]) -> str:
    """The format of most weights."""
    totals: dict[str, int] = {}
    for weight in weights:
        totals[weight.format] = totals.get(weight.format, 0) + weight.weights
    return max(totals, key=lambda name: totals[name], default="")


def explain(weights: Sequence[StoredWeight], architecture: str | None) -> list[Choice]:
    """Every format with its reasons, the largest part first."""
    main = main_format(weights)
    rules = RULES.get(architecture or "", PrecisionRules())
    bits = max((weight.bits for weight in weights if weight.format == main), default=0.0)
    found: dict[tuple[str, str], list[StoredWeight]] = {}
    for weight in weights:
        reason = _reason(weight, main, bits, rules, architecture)
        found.setdefault((weight.format, reason), []).append(weight)
    choices = [
        Choice(
            format=format,
            reason=reason,
            is_island=format != main and max(weight.bits for weight in members) > bits,
            tensors=len(members),
            weights=sum(weight.weights for weight in members),
            nbytes=sum(weight.nbytes for weight in members),
            examples=tuple(weight.name for weight in members[:EXAMPLES]),
        )
        for (format, reason), members in found.items()
    ]
    return sorted(choices, key=lambda choice: -choice.nbytes)


def _reason(
    weight: StoredWeight, main: str, main_bits: float, rules: PrecisionRules, architecture: str | None
) -> str:
    quantized = main_bits < _PLAIN_BITS
    if weight.format == main:
        return "the format of most weights" if quantized else "the model's own precision: it is not quantized"
    if weight.dtype is None:
        return _reason_of_quantized(weight, main)
    shape = weight.shape or ()
    if len(shape) <= 1:
        return "vectors (norms, biases): small, and errors in them reach every value"
    if rules.is_full(weight.name):
        return f"parameters that {architecture} reads itself, in full precision"
    if rules.is_half(weight.name):
        return f"delicate layers of {architecture}: embedders, modulation and output are kept precise"
    if math.prod(shape) <= MAX_SMALL:
        return f"at most {MAX_SMALL} weights: nothing to save"
    if not quantized:
        return "the writer's choice: another precision than most of the model"
    if not weight.name.endswith(".weight"):
        return "parameters that the model reads itself rather than through a layer"
    if len(shape) > 2:
        return "convolution kernels, which are rarely quantized"
    if (block := _block_size(main)) and shape[-1] % block:
        return f"rows that are no multiple of the {block} weights in a block of {main}"
    return "the writer's choice: kept precise"


def _reason_of_quantized(weight: StoredWeight, main: str) -> str:
    block = _block_size(main)
    if block and weight.shape and weight.shape[-1] % block:
        return f"rows that are no multiple of the {block} weights in a block of {main}"
    return f"the writer's choice: a mix of formats around {main}, by how much a layer suffers from fewer bits"


def _block_size(format: str) -> int:
    """Weights per block of a ggml format; 0 for others, which are not bound to rows."""
    fmt = FORMATS.get(format)
    return fmt.block_size if fmt is not None and fmt.block_size > 1 else 0
