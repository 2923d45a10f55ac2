"""The automatic mix: layers that matter most keep more bits, so that the model has the size that a user gives.

Each layer can be stored in the formats of one family (the types of GGUF, the formats of one library) or stay as it is.
What a format costs is its bytes, scales included; what it adds to the error of the network is

    sensitivity * sum((rounded - w)^2 * importance) / sum(w^2 * importance)

the relative error of the layer's product, by the mean square of its input channels where a calibration tells it, times
what the network makes of such an error, where that was measured (`sensitivity.measure_sensitivity`). Where it was not,
a layer counts by its number of weights: then only layers that round worse than others get more bits, which is the
safe half of the gain.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..core.errors import SnugError
from ..formats import FORMATS
from ..formats.scaled_base import rows_and_columns
from ..kernels.dequantize import dequantize_packed
from ..kernels.eight_bit import PRODUCTS
from ..memory.plan import size_text
from .allocation import Option, allocate
from .layers import LayerInfo
from .recipe import Recipe
from .target import AnyFormat, Target
from .targets import targets

# GGUF types that are worth their bytes, for rows of whole blocks of 256 and for others.
GGUF_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
NARROW_GGUF_TYPES = ("Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
# Weights of a layer that are rounded to see how well a format suits it: whole rows, spread over the layer.
SAMPLE = 1 << 18
# Layers named in a report.
NAMED = 8


@dataclass(frozen=True, slots=True)
class MixedLayer:
    """One layer of a mix. format: "" where it stays as it is; nbytes: what it takes; bits: per weight.

    error: relative error of its product; share: its part of the error of the whole, 0 to 1.
    """

    name: str
    format: str
    nbytes: int
    bits: float
    error: float
    share: float


@dataclass(frozen=True, slots=True)
class Mix:
    """overrides: for `Recipe.overrides`. layers: those that could be quantized. nbytes: of everything, what stays as it
    is included. sensitivity_known: whether it was measured.
    """

    overrides: Mapping[str, str]
    layers: tuple[MixedLayer, ...]
    nbytes: int
    sensitivity_known: bool

    def report(self) -> str:
        """For people: how many layers are in which format, and which got the most bits."""
        formats = Counter(layer.format for layer in self.layers)
        lines = [f"automatic mix: {size_text(self.nbytes)}"]
        for name in sorted(formats, key=lambda name: -_mean_bits(self.layers, name)):
            members = [layer for layer in self.layers if layer.format == name]
            share = sum(layer.share for layer in members)
            lines.append(
                f"  {name or 'as it is'}: {len(members)} layers, {_mean_bits(self.layers, name):.2f} bits per weight, "
                f"{size_text(sum(layer.nbytes for layer in members))}, {share:.0%} of the error"
            )
        if len(formats) > 1:
            most = sorted(self.layers, key=lambda layer: -layer.bits)[:NAMED]
            lines.append("most bits: " + ", ".join(f"{layer.name} ({layer.bits:.1f})" for layer in most))
        if not self.sensitivity_known:
            lines.append("how much the image depends on each layer was not measured; weights alone decided")
        return "\n".join(lines)


def automatic_mix(
    recipe: Recipe,
    layers: Iterable[LayerInfo],
    weight_of: Callable[[LayerInfo], torch.Tensor],
    budget: int,
    *,
    other_bytes: int = 0,
    sensitivity: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Mix:
    """The formats that give a network of at most `budget` bytes the least error.

    recipe: its target names the family and which layers are quantized at all; its importance counts. Overrides in it
        are kept.
    layers: of the network; dtype is what a layer that stays as it is takes.
    weight_of: a layer's weight (float, on any device), asked for once and only for layers that can be quantized.
    other_bytes: of everything in the network that is not the weight of one of `layers`.
    sensitivity: of the layers, measured with this network; those that are missing count as the median one.
    progress: called with the layers done and their number; may raise to cancel.

    Raises SnugError when the budget is too small for the smallest formats, and for targets that need a calibration.
    """
    if recipe.target.calibrated is not None:
        raise SnugError(
            f"{recipe.target.name} stores every layer in 8 bits and has nothing to mix for a size; leave the size out, "
            f"or choose another target, such as GGUF Q4_K."
        )
    layers = list(layers)
    families = {layer.name: family(recipe, layer) for layer in layers}
    fixed = other_bytes + sum(_kept_bytes(recipe, layer) for layer in layers if not families[layer.name])
    open_layers = [layer for layer in layers if families[layer.name]]
    factors = _factors(open_layers, sensitivity)
    options: dict[str, list[Option]] = {}
    for done, layer in enumerate(open_layers):
        if progress is not None:
            progress(done, len(open_layers))
        rows = _sample(weight_of(layer).detach())
        kept = Option("", _kept_bytes(None, layer), 0.0)
        options[layer.name] = [kept]
        for fmt in families[layer.name]:
            nbytes = packed_bytes(recipe.target, fmt, layer.shape)
            if nbytes < kept.nbytes:
                error = rounding_error(recipe.target, fmt, rows, recipe.importance.get(layer.name))
                options[layer.name].append(Option(fmt.name, nbytes, factors[layer.name] * error))
    if progress is not None:
        progress(len(open_layers), len(open_layers))
    try:
        chosen = allocate(options, budget - fixed)
    except SnugError as error:
        raise SnugError(
            f"The model cannot be brought to {size_text(budget)}: {size_text(fixed)} of it are not quantized. {error}"
        ) from None
    total = sum(option.error for option in chosen.values()) or 1.0
    mixed = tuple(
        MixedLayer(
            layer.name,
            (option := chosen[layer.name]).format,
            option.nbytes,
            8 * option.nbytes / max(1, layer.weights),
            option.error / (factors[layer.name] or 1.0),
            option.error / total,
        )
        for layer in open_layers
    )
    overrides = {**recipe.overrides, **{name: option.format for name, option in chosen.items()}}
    nbytes = fixed + sum(option.nbytes for option in chosen.values())
    return Mix(overrides, mixed, nbytes, bool(sensitivity))


def family(recipe: Recipe, layer: LayerInfo) -> list[AnyFormat]:
    """The formats that the layer may be given; empty when the recipe keeps it or says what it gets."""
    own = recipe.format_for(layer)
    if layer.name in recipe.overrides or own is None:
        return []
    if isinstance(own, PRODUCTS):  # others would not multiply in 8 bits
        return [own]
    if recipe.target.backend == "gguf":
        names = GGUF_TYPES if layer.shape[-1] % 256 == 0 else NARROW_GGUF_TYPES
        return [fmt for fmt in map(FORMATS.__getitem__, names) if fmt.can_quantize]
    position = recipe.positions.get(layer.name, (0, 1))
    found: dict[str, AnyFormat] = {}
    for target in (recipe.target, *targets().values()):
        if target.backend == recipe.target.backend and not target.unavailable:
            fmt = target.format_for(layer, *position)
            if fmt is not None:
                found.setdefault(fmt.name, fmt)
    return list(found.values())


def rounding_error(
    target: Target, fmt: AnyFormat, weight: torch.Tensor, importance: torch.Tensor | None = None
) -> float:
    """Squared relative error that a format makes in the product of a weight [out, in, ...].

    importance: float [in], mean square of the input channels; None counts all alike.
    """
    values = weight.float()
    rounded = dequantize_packed(target.encode(values, fmt, importance))
    error, size = (rounded - values).square_(), values.square()
    if importance is not None:
        channels = importance.to(values.device, torch.float32).view(-1, *(1,) * (values.dim() - 2))
        error, size = error.mul_(channels), size.mul_(channels)
    return (error.sum() / size.sum().clamp_min(torch.finfo(torch.float32).tiny)).item()


def packed_bytes(target: Target, fmt: AnyFormat, shape: tuple[int, ...]) -> int:
    """What a weight of this shape takes in the format, scales included (double quantization: but for a few bytes)."""
    if isinstance(fmt, type):
        return fmt.nbytes(shape)
    # Bytes grow by row; scaled formats do not say them but by being made.
    rows, (few, more) = shape[0], (64, 128)
    if rows <= more:
        return _bytes_of_zeros(target, fmt, shape)
    less, greater = (_bytes_of_zeros(target, fmt, (count, *shape[1:])) for count in (few, more))
    return greater + -(-(greater - less) * (rows - more) // (more - few))


@functools.lru_cache(maxsize=1024)
def _bytes_of_zeros(target: Target, fmt: AnyFormat, shape: tuple[int, ...]) -> int:
    return target.encode(torch.zeros(shape), fmt, None).nbytes


def _kept_bytes(recipe: Recipe | None, layer: LayerInfo) -> int:
    """What the layer takes in the format that the recipe's overrides give it, or as it is."""
    override = recipe.overrides.get(layer.name) if recipe else None
    if recipe and override:
        fmt = recipe.format_for(layer)
        assert fmt is not None
        return packed_bytes(recipe.target, fmt, layer.shape)
    return layer.weights * layer.dtype.itemsize


def _factors(layers: list[LayerInfo], sensitivity: Mapping[str, float] | None) -> dict[str, float]:
    """What the layers' relative errors are multiplied with."""
    if not sensitivity:
        return {layer.name: float(layer.weights) for layer in layers}
    known = sorted(sensitivity[layer.name] for layer in layers if layer.name in sensitivity)
    middle = known[len(known) // 2] if known else 1.0
    return {layer.name: sensitivity.get(layer.name, middle) for layer in layers}


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Rows spread evenly over the weight, as many as make up SAMPLE weights."""
    rows, columns = rows_and_columns(weight.shape)
    count = max(1, SAMPLE // max(1, columns))
    if rows <= count:
        return weight
    index = torch.linspace(0, rows - 1, count, device=weight.device).round().long()
    return weight.index_select(0, index)


def _mean_bits(layers: Iterable[MixedLayer], format: str) -> float:
    members = [layer for layer in layers if layer.format == format]
    weights = sum(8 * layer.nbytes / layer.bits for layer in members if layer.bits)
    return 8 * sum(layer.nbytes for layer in members) / weights if weights else 0.0
