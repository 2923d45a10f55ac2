"""Mapped files: what reading costs in memory and what may be written to, mapped read-only and copy-on-write."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from quantized_files import quantize_tensors
from safetensors.torch import save_file
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.readers import GGUFFile, load_diffusion_gguf, mapped_file
from snug.quant_backends.readers.conventions import open_quantized_safetensors
from snug.quant_backends.readers.mapped_file import map_file

MIB = 1 << 20
STATUS = Path("/proc/self/status")
ROWS, COLUMNS, LAYERS = 1024, 4096, 16  # 64 MiB at one byte a weight


@pytest.fixture(params=[False, True], ids=["copy-on-write", "read-only"], autouse=True)
def read_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The way files are mapped: read-only is Windows', which these tests can thus see elsewhere too."""
    monkeypatch.setattr(mapped_file, "maps_read_only", lambda: request.param)
    return request.param


def write_gguf(path: Path, layers: int) -> Path:
    writer = gguf.GGUFWriter(path, "flux")
    blocks = np.tile(np.frombuffer(bytes(2) + bytes(range(32)), np.uint8), (ROWS, COLUMNS // 32))
    for layer in range(layers):
        writer.add_tensor(
            f"double_blocks.{layer}.img_mlp.0.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0
        )
    writer.add_tensor("double_blocks.0.img_mlp.0.bias", np.ones(ROWS, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(path: Path, layers: int, kind: str) -> Path:
    columns = COLUMNS * 2 if kind.startswith("nf4") else COLUMNS
    tensors, metadata = quantize_tensors({"0.weight": torch.randn(ROWS, columns)}, kind)
    copies = {
        name.replace("0.", f"double_blocks.{layer}.", 1): value.clone()
        for layer in range(layers)
        for name, value in tensors.items()
    }
    save_file({**copies, "double_blocks.0.bias": torch.ones(ROWS)}, path, metadata=metadata)
    return path


def anonymous() -> int:
    """Bytes that this process uses and the system cannot drop."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is kept for later does not count
    return next(int(line.split()[1]) << 10 for line in STATUS.open() if line.startswith("RssAnon:"))


def touch(tensors: Iterable[PackedTensor | torch.Tensor]) -> int:
    """Reads every byte, so that the whole file is resident; returns how many."""
    nbytes = 0
    for tensor in tensors:
        parts = (tensor,) if isinstance(tensor, torch.Tensor) else (tensor.data, *tensor.parts.values())
        for part in parts:
            part.contiguous().view(-1).view(torch.uint8).sum()
            nbytes += part.nbytes
    return nbytes


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only Linux tells anonymous memory from that of mapped files",
)
@pytest.mark.parametrize("kind", ["Q8_0", "nf4", "nf4-nested", "int8", "fp8"])
def test_loading_takes_hardly_any_memory_of_its_own(kind: str, tmp_path: Path) -> None:
    def write(name: str, layers: int) -> Path:
        path = tmp_path / name
        return write_gguf(path, layers) if kind == "Q8_0" else write_safetensors(path, layers, kind)

    def read(path: Path) -> dict[str, PackedTensor | torch.Tensor]:
        return (load_diffusion_gguf if kind == "Q8_0" else open_quantized_safetensors)(path).state_dict

    touch(read(write("warm-up", 1)).values())
    path = write("file", LAYERS)
    readings, grown = [], []
    for _ in range(3):  # the system now and then fills holes in memory that was there before
        before = anonymous()
        readings.append(read(path))
        assert touch(readings[-1].values()) > 60 * MIB
        grown.append(anonymous() - before)
    assert min(grown) < 0.1 * path.stat().st_size


def test_plain_tensors_may_be_written_to(tmp_path: Path, read_only: bool) -> None:
    paths = [write_gguf(tmp_path / "a.gguf", 1), write_safetensors(tmp_path / "a.safetensors", 1, "int8")]
    contents = [path.read_bytes() for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = [
            load_diffusion_gguf(paths[0]).state_dict["double_blocks.0.img_mlp.0.bias"],
            open_quantized_safetensors(paths[1]).state_dict["double_blocks.0.bias"],
        ]
    for path, tensor, content in zip(paths, plain, contents, strict=True):
        assert map_file(path).readonly is read_only
        assert isinstance(tensor, torch.Tensor)
        assert tensor.add_(1).eq(2).all()
        assert path.read_bytes() == content


def test_packed_tensors_are_views_either_way(tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", 1))
    name = "double_blocks.0.img_mlp.0.weight"
    assert file.read(name).data_ptr() == file.read(name).data_ptr()
