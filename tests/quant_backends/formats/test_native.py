"""Weights packed by ggml's own quantizers decode as the gguf package says, and come close to the weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from snug.quant_backends.formats import FORMATS, Format

libgguf = pytest.importorskip("libgguf", reason="libgguf has ggml's quantizers in native code")

# Relative error (L2) of Gaussian weights that ggml's quantizers reach, rounded up.
WORST_ERROR = {
    "Q4_0": 0.1, "Q4_1": 0.09, "Q5_0": 0.05, "Q5_1": 0.045, "Q8_0": 0.01, "Q2_K": 0.35, "Q3_K": 0.18,
    "Q4_K": 0.09, "Q5_K": 0.045, "Q6_K": 0.025, "IQ4_NL": 0.09, "IQ4_XS": 0.09, "IQ3_S": 0.2,
    "IQ3_XXS": 0.25, "IQ2_S": 0.4, "IQ2_XS": 0.42, "IQ2_XXS": 0.5, "IQ1_S": 0.7, "IQ1_M": 0.7,
    "TQ1_0": 1.0, "TQ2_0": 1.0, "MXFP4": 0.15, "NVFP4": 0.12, "Q1_0": 0.65,
}  # fmt: skip


@pytest.mark.parametrize("name", WORST_ERROR)
def test_native_weights(
    name: str,
    reference: Callable[[type[Format], torch.Tensor], np.ndarray],
    assert_same_floats: Callable[[torch.Tensor, np.ndarray], None],
) -> None:
    fmt = FORMATS[name]
    weights = np.random.default_rng(3).standard_normal((8, 1024)).astype(np.float32) * np.float32(0.02)
    importance = np.ones(1024, np.float32) if libgguf.quantize_requires_imatrix(fmt.ggml_type) else None
    packed = libgguf.quantize_rows(weights, fmt.ggml_type, importance)
    blocks = torch.from_numpy(np.ascontiguousarray(packed).view(np.uint8).reshape(-1, fmt.block_bytes))
    found = fmt.dequantize_blocks(blocks)
    if name == "Q1_0":  # the gguf package does not decode it
        expected = libgguf.dequantize_rows(packed, fmt.ggml_type, 1024).reshape(-1, 128)
    else:
        expected = reference(fmt, blocks)
    assert_same_floats(found, expected)
    error = np.linalg.norm(found.numpy().ravel() - weights.ravel()) / np.linalg.norm(weights)
    assert error < WORST_ERROR[name]
