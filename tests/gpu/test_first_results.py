"""The check of first results finds every kernel right, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, needs_kernels, on_device
from random_packed import random_packed
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels import dispatch
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.kernels.fast_matmul import FLOAT8, INT8, round_weight
from snug.quant_backends.kernels.linear import linear
from snug.quant_backends.kernels.low_rank import decode_merged
from snug.quant_backends.kernels.rounding import rounded_tokens

pytestmark = needs_kernels
NAMES = [name for name, fmt in FORMATS.items() if fmt.dtype is None]
NAMES += [
    "bnb-nf4-64",
    "bnb-nf4-64-nested-256",
    "int8-rows-scb",
    "int8-1x32-zero",
    "float8_e4m3fn-rows",
    "float8_e5m2-tensor",
    "quanto-int4-128",
    "int8-rows-rotated-256",
]


# The interpreter shows that this test is right; every format goes through it in others.
@pytest.mark.parametrize("name", ["IQ2_S", "bnb-nf4-64"] if INTERPRETED else NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_kernel_is_given_up(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_fails", set())
    monkeypatch.setattr(dispatch, "_proven", set())
    # On a CPU nobody would choose the interpreter.
    monkeypatch.setattr(dispatch, "_torch_does", lambda device: dispatch._forced == dispatch.TORCH)
    packed = on_device(random_packed(name, (48, 512)))
    up, down = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((48, 16), (16, 512)))
    with torch.inference_mode():
        dequantize_packed(packed, dtype)
        for tokens in (1, 8):
            linear(torch.randn(tokens, 512, device=DEVICE, dtype=dtype), packed)
        decode_merged(packed, down / 64, up, dtype)
        for stored, width in ((INT8, 256), (FLOAT8, 1)):
            round_weight(packed, stored, dtype)
            rounded_tokens(torch.randn(8, 512, device=DEVICE, dtype=dtype), stored, width)
    assert not dispatch._fails
    kinds = {key[0] for key in dispatch._proven}
    assert kinds == {"dequantize", "linear", "dequantize with a LoRA", "round"}
    # Kernels of their own: products of few rows and of more; rounding to int8 and to float8, weights and inputs.
    assert len(dispatch._proven) == 4 + 4
