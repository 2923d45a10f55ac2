"""What fast matmul does to a model, as text: layers, how they are calculated, the error of each kind of layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch

from ...quant_backends.core.device import faster_product, multiplies_float8
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.kernels.device_products import device_product
from ...quant_backends.kernels.fast_matmul import (
    FLOAT8,
    INT8,
    fewest_tokens,
    restored,
    rotation_width,
    round_weight,
    rounded_linear,
    rounds_in_one_pass,
)
from ...quant_backends.memory.plan import size_text
from ...quant_backends.quantization.calibration import Calibration
from ...quant_backends.readers.packed_rows import cut_packed
from .fast_calls import fast_call_settings
from .layout import moved, packed_tensor
from .operations import PackedLinear
from .spare_memory import SpareSettings, compute_dtype, possible_copies

# Rows of each weight that the error is measured on: rows are rounded one by one.
_ROWS = 64
_NUMBER = re.compile(r"(^|\.)\d+(?=\.)")
_NAMES = {INT8: "int8", FLOAT8: "fp8"}


def fast_matmul_report(
    patcher: Any,
    layers: Mapping[str, PackedLinear],
    left: Counter[str],
    stored: str,
    calibration: Calibration | None,
) -> str:
    """layers: that multiply in 8 bits, by name in the network; left: how many others, by the reason."""
    device = patcher.load_device
    kept = ", ".join(f"{count} {reason}" for reason, count in left.most_common())
    lines = [
        f"fast matmul: {_NAMES[stored]} in {len(layers)} layers; {left.total()} of the blocks' layers are left out"
        + (f" ({kept})" if kept else "")
    ]
    if not layers:
        return lines[0]
    lines.append(_how(device, compute_dtype(patcher.model), stored, layers))
    settings = fast_call_settings(patcher)
    in_one_pass = all(rounds_in_one_pass(packed_tensor(layer.weight), device) for layer in layers.values())
    fewest, made = fewest_tokens(device, True, False), fewest_tokens(device, False, in_one_pass)
    if settings.copies is None:
        lines.append(
            f"weights are rounded anew in each call, which pays from {made} tokens on; others are exact"
        )
    else:
        rounded = dict.fromkeys(layers.values(), stored)
        count, nbytes = possible_copies(patcher.model, rounded, SpareSettings(dense=False))
        lines.append(
            f"rounded weights are kept where memory is free: {size_text(nbytes)} for all {count}; calls with fewer "
            f"than {fewest} tokens ({made} where there is no copy) are exact"
        )
    return "\n".join([*lines, *_error_lines(layers, stored, device, calibration)])


def _how(device: torch.device, dtype: torch.dtype, stored: str, layers: Mapping[str, PackedLinear]) -> str:
    widths = Counter(rotation_width(stored, layer.in_features) for layer in layers.values())
    rotated = ", ".join(f"{width}" for width in sorted(widths, reverse=True) if width > 1)
    what = f"inputs and weights rotated in groups of {rotated} channels; " if rotated else ""
    if any(device_product(device, dtype, stored, width) for width in widths):
        return f"{what}calculated by the device's own kernels"
    if faster_product(device) == stored or (stored == FLOAT8 and multiplies_float8(device)):
        return f"{what}calculated by torch's 8-bit matmul"
    return f"{what}this device ({device}) has no faster product for it: same results, but slower than exact"


def _error_lines(
    layers: Mapping[str, PackedLinear], stored: str, device: torch.device, calibration: Calibration | None
) -> list[str]:
    samples = {}
    if calibration is not None:
        samples = {name: found.sample for name, found in calibration.layers.items() if name in layers}
        samples = {name: sample for name, sample in samples.items() if sample is not None}
    # (square of the error, square of what it is an error of), summed by kind of layer
    sums: dict[str, torch.Tensor] = {}
    bar = comfy.utils.ProgressBar(len(layers))
    for name, layer in layers.items():
        management.throw_exception_if_processing_interrupted()
        bar.update(1)
        sample = samples.get(name)
        if samples and (sample is None or sample.shape[1] != layer.in_features):
            continue
        rows = moved(_some_rows(packed_tensor(layer.weight)), device)
        found = (
            _weight_error(rows, stored) if sample is None else _output_error(rows, stored, sample.to(device))
        )
        kind = _NUMBER.sub(r"\1*", name)
        sums[kind] = sums[kind] + found if kind in sums else found
    if not sums:
        return ["the calibration is of another model: none of its layers is among these"]
    if samples:
        title = f"error of the layers' outputs, for the calibration's inputs, of {_ROWS} outputs each:"
    else:
        title = (
            f"error of the rounded weights, of {_ROWS} rows each (rounding the inputs adds about as much or, with "
            f"outlier channels, more: connect a calibration to have the outputs measured):"
        )
    everything = sum(
        error / size for error, size in (found.tolist() for found in sums.values() if found[1] > 0)
    )
    lines = [f"  {kind}: {_percent(found)}" for kind, found in sorted(sums.items())]
    mean = torch.tensor([everything, float(len(sums))])
    return [title, *lines, f"  all kinds alike: {_percent(mean)}"]


def _percent(sums: torch.Tensor) -> str:
    error, size = sums.tolist()
    return f"{math.sqrt(error / size) if size else 0:.2%}"


def _some_rows(packed: PackedTensor) -> PackedTensor:
    """Rows from the middle of a weight; all where they cannot be cut out."""
    rows = packed.shape[0]
    start = max(0, rows // 2 - _ROWS // 2) // 8 * 8
    return cut_packed(packed, start, min(rows, start + _ROWS)) or packed


def _weight_error(rows: PackedTensor, stored: str) -> torch.Tensor:
    """Of rounding the weight alone: float64 [2], as above."""
    rounded = round_weight(rows, stored, torch.float32)
    back = restored(rounded)
    exact = dequantize_packed(rows)
    return torch.stack([(back - exact).double().square().sum(), exact.double().square().sum()]).cpu()


def _output_error(rows: PackedTensor, stored: str, sample: torch.Tensor) -> torch.Tensor:
    """Of the layer's output for the sample's rows, input and weight rounded: float64 [2]."""
    x = sample.float()
    exact = x @ dequantize_packed(rows).t()
    found = rounded_linear(x, round_weight(rows, stored, torch.float32))
    return torch.stack([(found - exact).double().square().sum(), exact.double().square().sum()]).cpu()
