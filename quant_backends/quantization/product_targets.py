"""Targets that round the input of layers as well, so that they are multiplied in 8 bits."""

from __future__ import annotations

import torch

from ..core.packed import PackedTensor
from ..formats.eight_bit_products import EightBitProducts
from ..kernels.dequantize import quantize_packed
from .activations import encode_calibrated
from .calibration import LayerStatistics
from .layers import LayerInfo
from .target import AnyFormat, Choose, Target

_NOTE = (
    "Multiplies in 8 bits, which GPUs do faster than in 16; the layers' inputs are rounded as well. Layers with a LoRA "
    "that is merged as it is used, and calls with few tokens, calculate with the decoded weight."
)


def _products(stored: str, activations: str) -> Choose:
    """For linear layers alone: no others are products of matrices."""

    def choose(layer: LayerInfo, block: int, blocks: int) -> AnyFormat | None:
        is_matrix = layer.kind == "linear" and len(layer.shape) == 2
        return EightBitProducts(stored, activations) if is_matrix else None

    return choose


def _calibrated(values: torch.Tensor, fmt: AnyFormat, statistics: LayerStatistics | None) -> PackedTensor:
    if not isinstance(fmt, EightBitProducts):  # another format, that overrides name
        return quantize_packed(values, fmt)
    if statistics is None:  # a layer that did not run
        return quantize_packed(values, EightBitProducts(fmt.stored))
    return encode_calibrated(values, fmt, statistics)


PRODUCTS = (
    Target("INT8 dynamic", "int8", _products("int8", "dynamic"), 8.0, note=_NOTE),
    Target("INT8 static", "int8", _products("int8", "static"), 8.0, note=_NOTE, calibrated=_calibrated),
    Target("FP8 dynamic", "fp8", _products("float8_e4m3fn", "dynamic"), 8.0, note=_NOTE),
    Target(
        "FP8 static", "fp8", _products("float8_e4m3fn", "static"), 8.0, note=_NOTE, calibrated=_calibrated
    ),
)
