"""Where the tests of the GPU kernels run: on a CUDA device, or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from snug.quant_backends.core.packed import PackedTensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda")
needs_kernels = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()),
        reason="needs a CUDA device; tests/quant_backends/kernels/test_triton.py runs it in Triton's interpreter",
    ),
    # The interpreter calculates with numpy, which warns of what random bytes hold.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def on_device(packed: PackedTensor) -> PackedTensor:
    """The packed tensor on DEVICE."""
    parts = {name: part.to(DEVICE) for name, part in packed.parts.items()}
    return PackedTensor(packed.data.to(DEVICE), packed.format, packed.shape, parts)
