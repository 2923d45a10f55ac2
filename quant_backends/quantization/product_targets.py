"""Targets that round the input of layers as well, so that they are multiplied in 8 bits."""

from __future__ import annotations

import re

import torch

from ..core.packed import PackedTensor
from ..formats.eight_bit_products import EightBitProducts
from ..formats.outlier_products import OutlierProducts
from ..kernels.dequantize import quantize_packed
from .activations import encode_calibrated
from .calibration import LayerStatistics
from .layers import LayerInfo
from .target import AnyFormat, Choose, Target

_NOTE = (
    "Multiplies in 8 bits, which GPUs do faster than in 16; the layers' inputs are rounded as well. Layers with a LoRA "
    "that is merged as it is used, and calls with few tokens, calculate with the decoded weight."
)


_THRESHOLD = re.compile(r"bitsandbytes LLM\.int8 threshold (\d{1,6}(?:\.\d{1,6})?)")
_USUAL_THRESHOLD = 6.0  # what transformers and diffusers pass to bitsandbytes


def _products(fmt: AnyFormat) -> Choose:
    """For linear layers alone: no others are products of matrices."""

    def choose(layer: LayerInfo, block: int, blocks: int) -> AnyFormat | None:
        return fmt if layer.kind == "linear" and len(layer.shape) == 2 else None

    return choose


def _calibrated(values: torch.Tensor, fmt: AnyFormat, statistics: LayerStatistics | None) -> PackedTensor:
    if not isinstance(fmt, EightBitProducts):  # another format, that overrides name
        return quantize_packed(values, fmt)
    if statistics is None:  # a layer that did not run
        return quantize_packed(values, EightBitProducts(fmt.stored))
    return encode_calibrated(values, fmt, statistics)


def _llm_int8(name: str, threshold: float) -> Target:
    note = (
        f"{_NOTE} Input columns with a magnitude of {threshold:g} or more are multiplied in 16 bits; another threshold "
        "is part of the name: 'bitsandbytes LLM.int8 threshold 3'."
    )
    return Target(name, "bitsandbytes", _products(OutlierProducts(threshold)), 8.0, note=note)


def threshold_target(name: str) -> Target | None:
    """The target of this name with a threshold of outliers in it; None for other names."""
    match = _THRESHOLD.fullmatch(name)
    return _llm_int8(name, float(match[1])) if match else None


_INT8, _FP8 = EightBitProducts("int8"), EightBitProducts("float8_e4m3fn")
_INT8_STATIC, _FP8_STATIC = (EightBitProducts(stored, "static") for stored in ("int8", "float8_e4m3fn"))

PRODUCTS = (
    Target("INT8 dynamic", "int8", _products(_INT8), 8.0, note=_NOTE),
    Target("INT8 static", "int8", _products(_INT8_STATIC), 8.0, note=_NOTE, calibrated=_calibrated),
    Target("FP8 dynamic", "fp8", _products(_FP8), 8.0, note=_NOTE),
    Target("FP8 static", "fp8", _products(_FP8_STATIC), 8.0, note=_NOTE, calibrated=_calibrated),
    _llm_int8("bitsandbytes LLM.int8", _USUAL_THRESHOLD),
)
