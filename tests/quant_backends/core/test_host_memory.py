from __future__ import annotations

import gc
import mmap

import pytest
import torch
from snug.quant_backends.core import host_memory

LARGE = (3, host_memory.HUGE_FROM_BYTES)
CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(), (0, 4), (7, 5), LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_tensors_are_ordinary(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = host_memory.empty(shape, dtype, CPU)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    tensor.fill_(3)
    assert torch.equal(tensor.clone(), torch.full(shape, 3, dtype=dtype))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages on request exist on Linux")
def test_memory_lives_as_long_as_a_view_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Watched(mmap.mmap):
        def __del__(self) -> None:
            closed.append(True)

    monkeypatch.setattr(host_memory.mmap, "mmap", Watched)
    row = host_memory.empty(LARGE, torch.uint8, CPU)[1]
    gc.collect()
    row.fill_(1)
    assert not closed
    del row
    gc.collect()
    assert closed


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages on request exist on Linux")
def test_a_kernel_without_huge_pages_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(host_memory.mmap, "mmap", Refusing)
    assert host_memory.empty(LARGE, torch.uint8, CPU).shape == LARGE


def test_without_the_system_call_it_is_torch_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(host_memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert host_memory.empty(LARGE, torch.uint8, CPU).untyped_storage().resizable()
