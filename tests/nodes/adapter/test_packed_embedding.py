"""Looking up rows of a packed embedding table equals decoding the whole table first, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels.dequantize import dequantize, dequantize_packed, quantize


def table(
    comfy: Any, format: str, rows: int = 96, width: int = 256, stored: int = 256
) -> tuple[Any, torch.Tensor]:
    """(module, decoded table); stored: width of the rows that were quantized."""
    from snug.nodes.adapter.layout import pack
    from snug.nodes.adapter.operations import build_operations
    from snug.nodes.adapter.packed_module import LoadSettings

    fmt = FORMATS[format]
    if fmt.can_quantize:
        data = quantize(
            torch.randn(rows * width // stored, stored, generator=torch.Generator().manual_seed(1)), fmt
        ).view(-1)
    else:
        data = torch.randint(0, 64, (fmt.nbytes((rows, width)),), dtype=torch.uint8)
    operations: Any = build_operations(LoadSettings(on_weight=lambda nbytes: None))
    module = operations.Embedding(rows, width, dtype=torch.float32)
    module.load_state_dict({"weight": pack(PackedTensor(data, fmt, (rows, width)), torch.float32)})
    return module, dequantize(data, fmt, (rows, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["Q4_0", "Q8_0", "Q6_K", "Q4_K", "F16", "BF16"])
def test_rows(format: str, dtype: torch.dtype, comfy: Any) -> None:
    module, dense = table(comfy, format)
    ids = torch.tensor([[0, 95, 17, 17], [3, 64, 0, 95]])
    found = module(ids, out_dtype=dtype)
    assert found.dtype == dtype and found.shape == (2, 4, 256)
    assert torch.equal(found.nan_to_num(), dense[ids].to(dtype).nan_to_num())


def test_only_the_rows_asked_for_are_decoded(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.quant_backends.kernels import embedding

    module, _ = table(comfy, "Q8_0")
    decoded: list[tuple[int, ...]] = []

    def watch(packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        decoded.append(packed.shape)
        return dequantize_packed(packed, dtype)

    monkeypatch.setattr(embedding, "dequantize_packed", watch)
    module(torch.tensor([[5, 6, 7]]))
    assert decoded == [(3, 256)]


def test_no_rows(comfy: Any) -> None:
    module, _ = table(comfy, "Q8_0")
    assert module(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 256)


def test_blocks_that_cross_rows(comfy: Any) -> None:
    """Some writers store tables under another shape; those are decoded whole."""
    module, dense = table(comfy, "Q8_0", rows=64, width=24, stored=32)
    assert torch.equal(module(torch.tensor([1, 63])), dense[[1, 63]])
