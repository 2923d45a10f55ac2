from __future__ import annotations

import pytest
import torch
from random_packed import random_packed
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.kernels.embedding import embedding

IDS = torch.tensor([[0, 95, 17, 17], [3, 64, 0, 95]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["int8-rows-scb", "int8-rows-zero", "int8-tensor", "float8_e4m3fn-rows", "float8_e5m2-tensor"]
)
def test_rows_take_their_scales_along(name: str, dtype: torch.dtype) -> None:
    table = random_packed(name, (96, 256))
    found = embedding(IDS, table, dtype)
    assert found is not None
    assert torch.equal(found, dequantize_packed(table, dtype)[IDS])


@pytest.mark.parametrize("name", ["bnb-nf4-64", "quanto-int4-128", "float8_e4m3fn-32x32"])
def test_formats_without_rows_of_their_own_are_left_to_the_caller(name: str) -> None:
    assert embedding(IDS, random_packed(name, (96, 256)), torch.float32) is None
