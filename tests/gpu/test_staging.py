"""On a CUDA device: weights that go there through pinned buffers arrive whole, and the buffers are given back."""

from __future__ import annotations

import pytest
import torch
from snug.quant_backends.memory.slab import host_bytes_in_use
from snug.quant_backends.memory.staging import Staging, staged, staged_copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_weights_arrive_whole() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    sources = [
        torch.randint(0, 255, (size,), dtype=torch.uint8) for size in (3 << 20, 150 << 20, 64 << 20, 1000)
    ]
    with staged_copies(device):
        copies = [staged(source, device) for source in sources]
        sums = [copy.sum(dtype=torch.int64) for copy in copies]  # used at once
    assert host_bytes_in_use() == 0
    for source, copy, total in zip(sources, copies, sums, strict=True):
        assert torch.equal(copy.cpu(), source) and int(total) == int(source.sum(dtype=torch.int64))


def test_buffers_are_used_again_only_after_copies_have_left_them() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    staging, sources = Staging(device, 1 << 16), [torch.full((1 << 20,), value) for value in range(20)]
    copies = [staging.copy(source) for source in sources]
    staging.close()
    assert all(torch.equal(copy.cpu(), source) for source, copy in zip(sources, copies, strict=True))
