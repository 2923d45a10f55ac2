"""What becomes of each layer of one network."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats.scaled import BitsAndBytes4Bit, format_called
from ..memory.layerwise import SkipRules, parse_skip_patterns
from ..writers.architecture import detect_architecture
from ..writers.mixes import block_numbers
from ..writers.plan import stored_shape
from ..writers.precision import RULES, PrecisionRules
from .calibration import LayerStatistics
from .layers import LayerInfo
from .target import AnyFormat, Target
from .targets import find_target


@dataclass(frozen=True, slots=True)
class Recipe:
    """target: for every layer that nothing else is said about. skip: which layers keep their precision.

    overrides: layer name to format name, "" to keep the layer; these win over skip. importance: layer name to float32
    [in], the mean square of each input channel. positions: of the layers, see `block_numbers`. kinds: of layers that
    are quantized at all. statistics: of each layer's input, for targets that need a calibration. fold: how GGUF files
    of the architecture hold rows that are no whole blocks: weights, kernels of convolutions too, are matrices of 256
    columns, and blocks cross rows. Overrides are not folded.
    """

    target: Target
    skip: SkipRules
    overrides: Mapping[str, str] = field(default_factory=dict)
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)
    positions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kinds: frozenset[str] = frozenset({"linear", "experts"})
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict)
    fold: PrecisionRules | None = None

    def format_for(self, layer: LayerInfo) -> AnyFormat | None:
        """The format that the layer's weight gets; None: it stays as it is."""
        override = self.overrides.get(layer.name)
        if override is not None:
            return format_called(override) if override else None
        layer = self._stored(layer)
        if layer.kind not in self.kinds or self.skip.reason(layer.name) is not None:
            return None
        place = self.positions.get(layer.name, (0, 1))
        if layer.kind != "experts":
            return self.target.format_for(layer, *place)
        fmt = self.target.format_for(
            replace(layer, shape=(math.prod(layer.shape[:-1]), layer.shape[-1])), *place
        )
        return fmt if _is_of_rows(fmt) else None

    def quantize(self, layer: LayerInfo, weight: torch.Tensor) -> PackedTensor | None:
        """The layer's weight (float, of its shape, on any device) packed, on that device; None: it stays as it is.

        Raises SnugError when its format cannot hold it.
        """
        fmt = self.format_for(layer)
        if fmt is None:
            return None
        statistics = self.statistics.get(layer.name)
        importance = self.importance.get(layer.name, None if statistics is None else statistics.mean_square)
        if importance is not None and tuple(importance.shape) != layer.shape[1:2]:
            raise SnugError(
                f"The calibration of layer {layer.name!r} has the shape {tuple(importance.shape)}, but its weight is "
                f"{layer.shape}; it was made with another model."
            )
        if self.target.calibrated is not None:
            return self.target.calibrated(weight.detach(), fmt, statistics)
        stored = layer if layer.name in self.overrides else self._stored(layer)
        if stored.shape == layer.shape:
            return self.target.encode(weight.detach(), fmt, importance)
        if importance is not None and layer.kind == "conv":
            importance = importance.repeat_interleave(math.prod(layer.shape[2:]))
        folded = self.target.encode(weight.detach().reshape(stored.shape), fmt, importance)
        return PackedTensor(folded.data, folded.format, layer.shape)

    def _stored(self, layer: LayerInfo) -> LayerInfo:
        """The layer with the shape that its weight has in a GGUF file, where that makes another one of it."""
        if self.fold is None or layer.kind == "embedding":
            return layer
        shape = stored_shape(layer.shape, self.fold)
        return (
            layer if shape == layer.shape or len(shape) != 2 else replace(layer, shape=shape, kind="linear")
        )

    def describe(self) -> dict[str, Any]:
        """What was done, for the metadata of a file; JSON's types only."""
        return {
            "target": self.target.name,
            "skip": [*self.skip.patterns, *self.skip.table.half],
            "kinds": sorted(self.kinds),
            "overrides": dict(self.overrides),
            "calibrated_layers": len(self.importance),
        }


def _is_of_rows(fmt: AnyFormat | None) -> bool:
    """Whether a format sees nothing but rows, in however many dimensions: all its scales are of runs in them."""
    return isinstance(fmt, type | BitsAndBytes4Bit)


def make_recipe(
    target: str | Target,
    layers: Iterable[LayerInfo],
    parameters: Collection[str] | None = None,
    *,
    skip: str = "default",
    is_text_encoder: bool = False,
    overrides: Mapping[str, str] | None = None,
    importance: Mapping[str, torch.Tensor] | None = None,
    kinds: Iterable[str] = ("linear", "experts"),
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> Recipe:
    """The recipe for a network with these layers.

    parameters: names of all its parameters, which tell the architecture; None: the layers' weights are all there are.
    skip: as `parse_skip_patterns` takes it. Raises SnugError for an unknown target or pattern,
    and for a target that needs a calibration without statistics.
    """
    names = [layer.name for layer in layers]
    known = [f"{name}.weight" for name in names] if parameters is None else parameters
    if isinstance(target, str):
        target = find_target(target)
    rules = RULES.get(detect_architecture(known) or "") if target.backend == "gguf" else None
    if target.calibrated is not None and not statistics:
        raise SnugError(
            f"{target.name} needs a calibration, as it chooses the scales of activations beforehand: record one with "
            f"Calibrate (Snug), or choose {target.name.replace('static', 'dynamic')}."
        )
    return Recipe(
        target,
        parse_skip_patterns(skip, known, is_text_encoder),
        dict(overrides or {}),
        dict(importance or {}),
        block_numbers(names),
        frozenset(kinds),
        dict(statistics or {}),
        rules if rules is not None and rules.fold_rows and not is_text_encoder else None,
    )
