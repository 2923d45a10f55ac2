"""Packed test data and the gguf package as the reference, shared by the tests of formats and kernels."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from snug.quant_backends.formats import Format

# f16 scales at the edges: zeros, subnormals, largest, infinities, NaN.
EXTREME_HALVES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01)


def _random_blocks(fmt: type[Format], n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, fmt.block_bytes), dtype=torch.uint8, generator=generator)


def _reference(fmt: type[Format], blocks: torch.Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[fmt.name])


def _assert_same_floats(found: torch.Tensor, expected: np.ndarray) -> None:
    reference = torch.from_numpy(np.ascontiguousarray(expected))
    assert found.dtype == reference.dtype == torch.float32
    assert found.shape == reference.shape
    assert torch.equal(found.isnan(), reference.isnan())
    differ = found.view(torch.int32) != reference.view(torch.int32)
    assert not (differ & ~reference.isnan()).any()


@pytest.fixture(scope="session")
def random_blocks() -> Callable[..., torch.Tensor]:
    """random_blocks(format, n, seed=0): n blocks of random bytes, uint8 [n, block_bytes]."""
    return _random_blocks


@pytest.fixture(scope="session")
def reference() -> Callable[[type[Format], torch.Tensor], np.ndarray]:
    """reference(format, blocks): what the gguf package decodes, float32."""
    return _reference


@pytest.fixture(scope="session")
def assert_same_floats() -> Callable[[torch.Tensor, np.ndarray], None]:
    """Equal bit for bit, signs of zeros included; a NaN equals every NaN."""
    return _assert_same_floats


@pytest.fixture(params=EXTREME_HALVES, ids=lambda bits: f"{bits:#06x}")
def extreme_half(request: pytest.FixtureRequest) -> int:
    """The bits of one float16 at the edge of what a scale can be."""
    return request.param
