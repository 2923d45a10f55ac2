"""What LoRA on a model costs in each way of applying it, as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import torch

from ...quant_backends.kernels.low_rank import LowRankShape
from .layout import is_packed
from .lora_bake import Baked, Baking, total
from .lora_kinds import is_costly, kind_of, low_rank_factors
from .lora_settings import LoraSettings
from .packed_module import packed_modules
from .patches import adapter_bytes

_WORST = 3
_TOKENS = 1000
# What a LoRA that is not there yet is reckoned with.
_TYPICAL_RANK = 16


@dataclass
class _Costs:
    """Of the packed layers with patches. branches: those that can take a side branch, at their summed rank."""

    layers: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    branches: list[LowRankShape] = field(default_factory=list)
    factor_bytes: int = 0
    largest: int = 0
    kept_bytes: int = 0


def mode_report(patcher: Any, settings: LoraSettings) -> str:
    """The mode, and the cost of every mode for the LoRAs that the MODEL has now."""
    return "\n".join([f"LoRA mode: {settings.mode}", *_lines(patcher, settings)])


def _lines(patcher: Any, settings: LoraSettings) -> list[str]:
    lines: list[str] = []
    costs = _costs(patcher)
    if costs.layers:
        lines += _cost_lines(costs, settings)
    else:
        lines += _typical_lines(patcher)
    plain, foreign = _other_layers(patcher)
    if plain:
        lines.append(
            f"{plain} patched weights are not quantized: ComfyUI merges them when it loads the model, which costs "
            f"nothing afterwards, in every mode"
        )
    if foreign:
        lines.append(
            f"{foreign} patched layers are in a quantized format of ComfyUI's own, which merges and quantizes again; "
            f"load the file with Load Diffusion Model (Snug) to choose"
        )
    return lines


def bake_report(baking: Baking, patcher: Any, settings: LoraSettings) -> str:
    """How many layers have been baked, the error of quantizing again, and what could not be baked.

    patcher: the result; settings: how it applies what is not baked in.
    """
    lines = [f"LoRA mode: bake in; {len(baking.baked)} layers baked"]
    if baking.baked:
        everything = total(baking.baked)
        lines.append(f"rounding: {_errors(everything)}")
        worst = sorted(baking.baked, key=_share, reverse=True)[:_WORST]
        lines += [f"  {layer.name}: {_errors(layer)}" for layer in worst]
    lines += [
        f"{count} {reason}: their LoRA is merged while dequantizing" for reason, count in baking.kept.items()
    ]
    if not (baking.baked or baking.kept):
        lines.append(
            "no quantized layer has a LoRA here: connect this node behind the LoRA nodes to bake them in"
        )
    lines += _lines(patcher, settings) if patcher.patches else []
    return "\n".join([*lines, "LoRA nodes behind this one are merged while dequantizing"])


def _errors(layer: Baked) -> str:
    error = math.sqrt(layer.rounding / layer.merged) if layer.merged else 0.0
    return f"{error:.2%} of the weights, {_share(layer):.1%} of the LoRA's change"


def _share(layer: Baked) -> float:
    """The rounding as a part of what the LoRA changes; more than 1 where it is drowned."""
    return math.sqrt(layer.rounding / layer.change) if layer.change else 0.0


def _costs(patcher: Any) -> _Costs:
    costs = _Costs()
    for module, patches in _patched(patcher):
        costs.layers += 1
        costs.kinds.update({kind_of(patch) for patch in patches})
        costs.factor_bytes += adapter_bytes(patches)
        weight = module.weight
        costs.largest = max(costs.largest, weight.numel())
        if any(is_costly(patch) for patch in patches):
            costs.kept_bytes += weight.numel() * weight.dtype.itemsize
        factors = low_rank_factors(patches, weight.shape) if isinstance(module, torch.nn.Linear) else None
        if factors:
            rank = sum(len(part.down) for part in factors)
            rows, columns = weight.shape
            costs.branches.append(LowRankShape(rows, columns, rank))
    return costs


def _patched(patcher: Any) -> Iterator[tuple[Any, list[Any]]]:
    for name, module in packed_modules(patcher.model):
        patches = patcher.patches.get(f"{name}.weight")
        if patches:
            yield module, patches


def _cost_lines(costs: _Costs, settings: LoraSettings) -> list[str]:
    kinds = ", ".join(f"{count} with {kind}" for kind, count in costs.kinds.most_common())
    lines = [
        f"{costs.layers} quantized layers with LoRA: {kinds}; {_megabytes(costs.factor_bytes)} of factors"
    ]
    if costs.branches:
        lines.append(f"{len(costs.branches)} of them can take a side branch{_ranks(costs.branches)}")
        lines += _flop_lines(costs.branches)
    others = costs.layers - len(costs.branches)
    if others:
        lines.append(f"{others} are always merged while they are dequantized")
    lines.append(
        f"merging needs up to {_megabytes(4 * costs.largest)} at a time for a weight in float32, a side branch none"
    )
    if costs.kept_bytes:
        kept = (
            f"up to {_megabytes(costs.kept_bytes)}, where memory allows" if settings.cache else "none (off)"
        )
        lines.append(f"kept merged: {kept}")
    return lines


def _ranks(shapes: list[LowRankShape]) -> str:
    ranks = sorted({shape.rank for shape in shapes})
    return f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"


def _flop_lines(shapes: list[LowRankShape]) -> list[str]:
    """Both ways for one step, that is one call of the model."""
    branch = sum(shape.branch_flop(_TOKENS) for shape in shapes)
    return [
        f"merging while dequantizing: {_flop(sum(shape.merge_flop for shape in shapes))} per step, and passes over "
        f"{_megabytes(4 * sum(shape.rows * shape.columns for shape in shapes))} of float32 weights",
        f"side branch: {_flop(branch)} per step and {_TOKENS:,} tokens",
        "bake in: nothing per step",
    ]


def _typical_lines(patcher: Any) -> list[str]:
    shapes = [
        LowRankShape(module.weight.shape[0], module.weight.shape[1], _TYPICAL_RANK)
        for _, module in packed_modules(patcher.model)
        if isinstance(module, torch.nn.Linear)
    ]
    if not shapes:
        return ["this model has no quantized layers that Snug decodes: the mode changes nothing"]
    nbytes = sum(2 * shape.rank * (shape.rows + shape.columns) for shape in shapes)
    return [
        "the quantized layers have no LoRA here; the mode holds for LoRA nodes behind this one (bake in does not)",
        f"a LoRA of rank {_TYPICAL_RANK} on all {len(shapes)} would have {_megabytes(nbytes)} of factors in 16 bits",
        *_flop_lines(shapes),
    ]


def _other_layers(patcher: Any) -> tuple[int, int]:
    """Patched weights that are no packed ones: plain, and quantized by others."""
    plain = foreign = 0
    for key, patches in patcher.patches.items():
        weight = comfy.utils.get_attr(patcher.model, key) if patches and key.endswith(".weight") else None
        if weight is None or is_packed(weight):
            continue
        quantized = type(weight) is not torch.nn.Parameter or weight.dtype.itemsize == 1
        plain, foreign = plain + (not quantized), foreign + quantized
    return plain, foreign


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MB"


def _flop(count: int) -> str:
    return f"{count / 1e9:,.2f} GFLOP" if count < 1e12 else f"{count / 1e12:,.2f} TFLOP"
