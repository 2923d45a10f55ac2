"""Before a model is used, each format's kernel is compiled and its result compared, which zeros would not tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_packed import random_packed
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels import dispatch


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.dtype is None])
def test_a_kernel_that_decodes_wrong_is_found(name: str, comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.nodes.adapter.layout import pack, warm_up

    counts = []

    def wrong(found: Any, tensors: Any, out: torch.Tensor) -> None:
        counts.append(found.columns // found.a)
        out.zero_()

    def kernels(device: torch.device, dtype: torch.dtype) -> Any:
        return None if dispatch._forced == dispatch.TORCH else SimpleNamespace(dequantize=wrong)

    monkeypatch.setattr(dispatch, "_fails", set())
    monkeypatch.setattr(dispatch, "_proven", set())
    monkeypatch.setattr(dispatch, "_kernels", kernels)
    packed = random_packed(name, (2, FORMATS[name].block_size))
    warm_up(pack(packed, torch.bfloat16), torch.device("cpu"))
    assert len(dispatch._fails) == 1 and not dispatch._proven
    # Triton compiles one kernel for one block, one for multiples of 16 and one for the rest: the one that weights take.
    assert counts[0] > 1 and counts[0] % 16 == 0
