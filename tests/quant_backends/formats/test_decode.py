"""Every format decodes to the gguf package's float32 bit for bit; a new format is tested once it is defined."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from snug.quant_backends.formats import FORMATS, Format

# The gguf package only passes plain types on; Q1_0 it does not decode: see test_hand_made.py.
REFERENCED = [fmt for name, fmt in FORMATS.items() if fmt.dtype is None and name != "Q1_0"]
every_format = pytest.mark.parametrize("fmt", REFERENCED, ids=lambda fmt: fmt.name)

RandomBlocks = Callable[..., torch.Tensor]
Reference = Callable[[type[Format], torch.Tensor], np.ndarray]
AssertSame = Callable[[torch.Tensor, np.ndarray], None]


@every_format
@pytest.mark.parametrize("n", [1, 2, 3, 1001])
def test_random_bytes(
    fmt: type[Format],
    n: int,
    random_blocks: RandomBlocks,
    reference: Reference,
    assert_same_floats: AssertSame,
) -> None:
    blocks = random_blocks(fmt, n, seed=n)
    assert_same_floats(fmt.dequantize_blocks(blocks), reference(fmt, blocks))


@every_format
@pytest.mark.parametrize("byte", [0, 255])
def test_equal_bytes(
    fmt: type[Format], byte: int, reference: Reference, assert_same_floats: AssertSame
) -> None:
    blocks = torch.full((5, fmt.block_bytes), byte, dtype=torch.uint8)
    assert_same_floats(fmt.dequantize_blocks(blocks), reference(fmt, blocks))


@every_format
def test_extreme_scales(
    fmt: type[Format],
    extreme_half: int,
    random_blocks: RandomBlocks,
    reference: Reference,
    assert_same_floats: AssertSame,
) -> None:
    # Wherever a format keeps its scale, some two bytes of some block hit it.
    blocks = random_blocks(fmt, fmt.block_bytes - 1)
    for i, block in enumerate(blocks):
        block[i : i + 2] = torch.tensor([extreme_half & 255, extreme_half >> 8], dtype=torch.uint8)
    assert_same_floats(fmt.dequantize_blocks(blocks), reference(fmt, blocks))


@every_format
def test_every_value_of_every_byte(
    fmt: type[Format], random_blocks: RandomBlocks, reference: Reference, assert_same_floats: AssertSame
) -> None:
    values = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    blocks = (random_blocks(fmt, 1) + values).contiguous()
    assert_same_floats(fmt.dequantize_blocks(blocks), reference(fmt, blocks))


@every_format
def test_blocks_that_are_a_view_of_more(
    fmt: type[Format], random_blocks: RandomBlocks, reference: Reference, assert_same_floats: AssertSame
) -> None:
    blocks = random_blocks(fmt, 7)
    for start in range(1, 7):
        assert_same_floats(fmt.dequantize_blocks(blocks[start:]), reference(fmt, blocks[start:]))


PLAIN = [fmt for fmt in FORMATS.values() if fmt.dtype is not None]


@pytest.mark.parametrize("fmt", PLAIN, ids=lambda fmt: fmt.name)
def test_plain_types_keep_their_values(fmt: type[Format]) -> None:
    assert fmt.dtype is not None
    values = torch.tensor([0, 1, -2, 100, -128]).to(fmt.dtype)
    decoded = fmt.dequantize_blocks(values.view(torch.uint8).view(-1, fmt.block_bytes))
    assert decoded.dtype == (torch.float64 if fmt.block_bytes == 8 else torch.float32)
    assert decoded.squeeze(1).tolist() == [0, 1, -2, 100, -128]


def test_big_integers_are_not_rounded_to_float32() -> None:
    value = torch.tensor([2**53 - 1])
    assert FORMATS["I64"].dequantize_blocks(value.view(torch.uint8).view(1, 8)).item() == 2**53 - 1
