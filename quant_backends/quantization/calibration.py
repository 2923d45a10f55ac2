"""What reaches the layers of a network while it runs: the ranges and the importance of their inputs.

Recorded with one's own prompts and steps, this tells a quantizer which input channels of a weight matter (their mean
square: the error that rounding a weight causes in the output grows with it) and how large a layer's inputs become (for
activations in 8 bits with scales chosen beforehand).

A calibration file is safetensors, with for each layer that ran::

    <layer>.mean_square  float32 [in]  mean of the squared inputs of a channel
    <layer>.absmax       float32 [in]  largest magnitude of a channel
    <layer>.range        float32 [2]   least and largest input of all channels
    <layer>.rows         int64 [1]     rows (tokens, pixels) that went through the layer
    <layer>.sample       bfloat16 [n, in]  some of the rows, each as likely as any other; linear layers alone
    metadata             "snug_calibration": JSON of `Calibration.info`

Layers are named as in the network, and `in` counts what the layer is given: the channels of a convolution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.errors import FileFormatError, SnugError
from ..readers.safetensors_file import SafetensorsFile
from ..writers.safetensors_file import write_safetensors

METADATA_KEY = "snug_calibration"
_PARTS = {"mean_square": torch.float32, "absmax": torch.float32, "range": torch.float32, "rows": torch.int64}
_SAMPLE = "sample"


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Of the inputs of one layer. mean_square, absmax: float32 [in]; range: float32 [2]; rows: how many were seen.

    sample: bfloat16 [n, in], rows taken at random, or None. All on the CPU.
    """

    mean_square: torch.Tensor
    absmax: torch.Tensor
    range: torch.Tensor
    rows: int
    sample: torch.Tensor | None = None

    def joined(self, other: LayerStatistics) -> LayerStatistics:
        """As if one recording had seen the inputs of both."""
        rows = self.rows + other.rows
        share = self.rows / rows
        return LayerStatistics(
            self.mean_square * share + other.mean_square * (1 - share),
            torch.maximum(self.absmax, other.absmax),
            torch.stack(
                [torch.minimum(self.range[0], other.range[0]), torch.maximum(self.range[1], other.range[1])]
            ),
            rows,
            self._joined_sample(other, share),
        )

    def _joined_sample(self, other: LayerStatistics, share: float) -> torch.Tensor | None:
        if self.sample is None or other.sample is None:
            return self.sample if other.sample is None else other.sample
        count = max(len(self.sample), len(other.sample))
        own = self.sample[: round(count * share)]
        return torch.cat([own, other.sample[: count - len(own)]])


@dataclass(frozen=True, slots=True)
class Calibration:
    """layers: by name in the network; info: what they were recorded with, as JSON can hold it."""

    layers: Mapping[str, LayerStatistics]
    info: Mapping[str, Any]

    @property
    def importance(self) -> dict[str, torch.Tensor]:
        """float32 [in] of each layer: the weight of an error in a column of the layer's weight."""
        return {name: found.mean_square for name, found in self.layers.items()}

    @property
    def sensitivity(self) -> dict[str, float]:
        """How much the network's output depends on each layer, see `sensitivity`; empty where it was not measured."""
        found = self.info.get("sensitivity")
        values = found.items() if isinstance(found, Mapping) else ()
        return {
            str(name): float(value)
            for name, value in values
            if isinstance(value, int | float) and math.isfinite(value) and value >= 0
        }

    def joined(self, other: Calibration) -> Calibration:
        """Both recordings of one model as one. Raises SnugError where a layer differs in its channels."""
        layers = {**self.layers, **other.layers}
        for name in self.layers.keys() & other.layers.keys():
            first, second = self.layers[name], other.layers[name]
            if first.absmax.shape != second.absmax.shape:
                raise SnugError(
                    f"The calibrations are of different models: layer {name} has {len(first.absmax)} input channels "
                    f"in one and {len(second.absmax)} in the other; record both with the same model."
                )
            layers[name] = first.joined(second)
        counts = {
            key: self.info.get(key, 0) + other.info.get(key, 0) for key in ("samples", "steps", "calls")
        }
        return Calibration(layers, {**self.info, **other.info, **counts})


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Writes the file whole or not at all; one of the same name is replaced.

    Raises OSError, and SnugError when the disk is too full.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, found in calibration.layers.items():
        tensors[f"{name}.mean_square"] = found.mean_square
        tensors[f"{name}.absmax"] = found.absmax
        tensors[f"{name}.range"] = found.range
        tensors[f"{name}.rows"] = torch.tensor([found.rows])
        if found.sample is not None:
            tensors[f"{name}.{_SAMPLE}"] = found.sample
    description = json.dumps(dict(calibration.info), sort_keys=True)
    write_safetensors(path, tensors, metadata={METADATA_KEY: description})


def load_calibration(path: Path) -> Calibration:
    """The file's contents, in memory of their own. Raises FileFormatError when it is no calibration or damaged."""
    file = SafetensorsFile(path)
    hint = "choose a file that Calibrate (Snug) has saved"
    try:
        info = json.loads(file.metadata[METADATA_KEY])
    except KeyError:
        file.fail("the file holds no calibration", hint)
    except ValueError:
        file.fail("the description of the calibration is not valid JSON", hint)
    if not isinstance(info, dict):
        file.fail("the description of the calibration is not a JSON object", hint)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key in file.tensors:
        name, _, part = key.rpartition(".")
        if part in _PARTS or part == _SAMPLE:
            parts.setdefault(name, {})[part] = file.read(key).clone()
    layers = {name: _checked(file, name, found) for name, found in parts.items()}
    if not layers:
        raise FileFormatError(path, "the calibration has no layers", hint)
    return Calibration(layers, info)


def _checked(file: SafetensorsFile, name: str, parts: Mapping[str, torch.Tensor]) -> LayerStatistics:
    hint = "the file is damaged; record the calibration again"
    missing = _PARTS.keys() - parts.keys()
    if missing:
        file.fail(f"layer {name} lacks its {' and '.join(sorted(missing))}", hint)
    channels, sample = parts["absmax"].numel(), parts.get(_SAMPLE)
    shapes: dict[str, tuple[int, ...]] = {
        "mean_square": (channels,),
        "absmax": (channels,),
        "range": (2,),
        "rows": (1,),
    }
    dtypes = dict(_PARTS)
    if sample is not None:
        shapes[_SAMPLE] = (len(sample) if sample.dim() else 1, channels)
        dtypes[_SAMPLE] = torch.bfloat16
    for part, dtype in dtypes.items():
        found, shape = parts[part], shapes[part]
        if found.dtype != dtype or tuple(found.shape) != shape:
            kind = f"{found.dtype} {tuple(found.shape)}"
            file.fail(f"the {part} of layer {name} is {kind}, expected {dtype} {shape}", hint)
        if not torch.isfinite(found).all():
            file.fail(f"the {part} of layer {name} has values that are not finite", hint)
    rows = int(parts["rows"])
    if rows < 1:
        file.fail(f"layer {name} has seen {rows} rows, expected at least 1", hint)
    return LayerStatistics(parts["mean_square"], parts["absmax"], parts["range"], rows, sample)
