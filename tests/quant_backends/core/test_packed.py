from __future__ import annotations

import dataclasses

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS

Q8_0 = FORMATS["Q8_0"]


def test_a_packed_tensor_knows_its_size_and_cannot_change() -> None:
    packed = PackedTensor(torch.zeros(4 * 34, dtype=torch.uint8), Q8_0, (2, 64))
    assert packed.nbytes == 136
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.shape = (4, 32)  # pyright: ignore[reportAttributeAccessIssue]


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(SnugError, match=r"Q8_0 tensor of shape \(2, 64\) takes 136 bytes .* got 135 bytes"):
        PackedTensor(torch.zeros(135, dtype=torch.uint8), Q8_0, (2, 64))


@pytest.mark.parametrize("data", [torch.zeros(2, 68, dtype=torch.uint8), torch.zeros(136, dtype=torch.int8)])
def test_anything_but_a_row_of_bytes_is_refused(data: torch.Tensor) -> None:
    with pytest.raises(SnugError, match="1-D uint8"):
        PackedTensor(data, Q8_0, (2, 64))
