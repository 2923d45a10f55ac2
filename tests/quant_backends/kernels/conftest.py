"""Decoding by torch alone, where ggml's own code would take over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from snug.quant_backends.kernels.native import torch_only


@pytest.fixture
def torch_alone() -> Iterator[None]:
    with torch_only():
        yield
