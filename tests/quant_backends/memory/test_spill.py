"""Which tensors count as lying in a file: not those in memory that a GPU's driver has mapped under a name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from snug.quant_backends.memory import spill
from snug.quant_backends.memory.slab import _bytes_from
from snug.quant_backends.memory.spill import FileBacked


@pytest.mark.parametrize(
    ("mapped", "is_file"),
    [
        ("/models/a file.gguf", True),
        ("/tmp/snug-offload-x (deleted)", True),
        ("/dev/shm/snug-offload-x (deleted)", True),
        ("/dev/zero (deleted)", False),  # pinned by torch
        ("/dev/nvidia-uvm", False),
        ("/memfd:x (deleted)", False),
    ],
)
def test_by_what_is_mapped(
    mapped: str, is_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.zeros(64)
    address = tensor.data_ptr()
    maps = tmp_path / "maps"
    maps.write_text(
        f"{address:x}-{address + 64:x} rw-p 00000000 00:05 475                    {mapped}\n"
        f"{address + 64:x}-{address + 256:x} rw-p 00000000 00:00 0 \n"
    )
    monkeypatch.setattr(spill, "MAPS", maps)
    backed = FileBacked()
    assert (tensor in backed) == is_file
    assert tensor[16:] not in backed
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), data_ptr=lambda: address)
    assert on_gpu not in backed


def test_memory_of_another_device_is_no_slab() -> None:
    assert _bytes_from(torch.zeros(512, dtype=torch.uint8, device="meta"), 0, 512) is None
    assert _bytes_from(torch.zeros(512, dtype=torch.uint8), 0, 512) is not None
