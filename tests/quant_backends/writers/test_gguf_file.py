"""GGUF files as the gguf package reads them back."""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.formats.scaled import scaled_format
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed
from snug.quant_backends.writers import gguf_file, write_gguf

WAN_NAMES = {"head.modulation": (1, 2, 512), "blocks.0.self_attn.norm_q.weight": (512,)}


def gguf_quantizer(values: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name]))


def wan_tensors(**more: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {**WAN_NAMES, **more}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def field(reader: gguf.GGUFReader, key: str) -> Any:
    value = reader.get_field(key)
    assert value is not None, key
    return value.contents()


def read_back(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type name and dequantized values, in the shape a loader gives them, by tensor name."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        original = reader.get_field(gguf_file.ORIGINAL_SHAPE + tensor.name)
        shape = original.contents() if original else [int(size) for size in reversed(tensor.shape)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = (tensor.tensor_type.name, values.reshape(shape))
    return tensors


def test_round_trip(tmp_path: Path) -> None:
    tensors = wan_tensors(
        **{
            "blocks.0.ffn.0.weight": (96, 512),
            "patch_embedding.weight": (512, 16, 1, 2, 2),
            "text_embedding.0.weight": (64, 64),
        }
    )
    path = tmp_path / "model.gguf"
    done: list[tuple[int, int]] = []
    write_gguf(path, tensors, "Q8_0", quantizer=gguf_quantizer, progress=lambda *step: done.append(step))

    found = read_back(path)
    assert {name: kind for name, (kind, _) in found.items()} == {
        "head.modulation": "F32",
        "blocks.0.self_attn.norm_q.weight": "F32",
        "blocks.0.ffn.0.weight": "Q8_0",
        "patch_embedding.weight": "F32",
        "text_embedding.0.weight": "BF16",
    }
    for name, tensor in tensors.items():
        kind, values = found[name]
        assert values.shape == tuple(tensor.shape)
        if kind == "Q8_0":
            blocks = tensor.float().reshape(-1, 32)
            error = (torch.from_numpy(values).reshape(-1, 32) - blocks).abs().amax(1)
            half_step = blocks.abs().amax(1) / 127 / 2
            assert (error <= half_step * 1.01 + 1e-3 * blocks.abs().amax(1)).all()
        else:
            assert np.array_equal(values, tensor.float().numpy())
    sizes = [1024 * 4, 512 * 4, 96 * 512 // 32 * 34, 512 * 16 * 4 * 4, 64 * 64 * 2]
    assert done == [(sum(sizes[:count]), sum(sizes)) for count in range(1, 6)]
    assert list(tmp_path.iterdir()) == [path]


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    more = {"text": "ä", "count": 3, "big": 1 << 40, "minus": -1, "ratio": 0.25, "yes": True, "list": [1, 2]}
    write_gguf(path, wan_tensors(x=(2, 2, 2, 2, 2)), "F16", metadata=more)
    reader = gguf.GGUFReader(path)
    assert {key: field(reader, key) for key in more} == more
    # llama.cpp asks for its numbers in this type.
    assert reader.fields["ratio"].types == [gguf.GGUFValueType.FLOAT32]
    assert field(reader, "general.architecture") == "wan"
    assert field(reader, "general.quantization_version") == gguf.GGML_QUANT_VERSION
    assert field(reader, "general.file_type") == gguf.LlamaFileType.MOSTLY_F16
    original = reader.get_field("comfy.gguf.orig_shape.x")
    assert original is not None
    assert original.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Q4_0", "MOSTLY_Q4_0"), ("Q4_K", "MOSTLY_Q4_K_S"), ("Q6_K", "MOSTLY_Q6_K"), ("F32", "ALL_F32")],
)
def test_file_type(name: str, expected: str) -> None:
    assert gguf_file._file_type(gguf, name) == gguf.LlamaFileType[expected]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_formats(tmp_path: Path, name: str) -> None:
    tensors = wan_tensors(x=(64, 64))
    write_gguf(tmp_path / "model.gguf", tensors, name)
    kind, values = read_back(tmp_path / "model.gguf")["x"]
    assert kind == name
    np.testing.assert_allclose(values, tensors["x"].float().numpy(), atol=1e-7)


def test_caller_names_an_unknown_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", {"x": torch.zeros(64, 64)}, "F16", architecture="mine")
    assert field(gguf.GGUFReader(tmp_path / "model.gguf"), "general.architecture") == "mine"
    with pytest.raises(SnugError, match="pass architecture="):
        write_gguf(tmp_path / "other.gguf", {"x": torch.zeros(64, 64)}, "F16")


class FailingTensors(dict[str, torch.Tensor]):
    """Gives every tensor once, for planning, and fails when the last one is to be written."""

    reads = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads += 1
        if self.reads == 2 * len(self):
            raise OSError("the source went away")
        return super().__getitem__(name)


def test_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="went away"):
        write_gguf(path, FailingTensors(wan_tensors()), "F16")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_quantizer_must_return_whole_blocks(tmp_path: Path) -> None:
    with pytest.raises(SnugError, match="takes 4352 bytes .*got 7 "):
        write_gguf(
            tmp_path / "model.gguf",
            wan_tensors(x=(64, 64)),
            "Q8_0",
            quantizer=lambda values, name: torch.zeros(7, dtype=torch.uint8),
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_outside_float16(tmp_path: Path) -> None:
    tensors = wan_tensors(x=(64, 64))
    tensors["x"][0, 0] = 1e6
    with pytest.raises(SnugError, match="'x' has weights up to 9.99e.05, outside the range of F16"):
        write_gguf(tmp_path / "model.gguf", tensors, "F16")


@pytest.mark.parametrize("name", ["Q9_9", "I32", "q8_0"])
def test_unknown_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(SnugError, match="no format for weights; choose one of .*Q8_0"):
        write_gguf(tmp_path / "model.gguf", wan_tensors(), name)


def test_format_that_needs_a_quantizer(tmp_path: Path) -> None:
    with pytest.raises(SnugError, match="cannot quantize to IQ3_S; .*or pass a quantizer"):
        write_gguf(tmp_path / "model.gguf", wan_tensors(), "IQ3_S")


def test_missing_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SnugError, match="pip install gguf"):
        write_gguf(tmp_path / "model.gguf", wan_tensors(), "F16")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(SnugError, match="has 0.00 GB free"):
        write_gguf(tmp_path / "model.gguf", wan_tensors(), "F16")
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_taken_one_at_a_time(tmp_path: Path) -> None:
    class Lazy(Mapping[str, torch.Tensor]):
        """Builds each tensor when asked and counts how many are alive."""

        def __init__(self) -> None:
            self.alive = self.most = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            tensor = torch.zeros((512,) if name.endswith("norm_q.weight") else (64, 512))
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(tensor, self._release)
            return tensor

        def _release(self) -> None:
            self.alive -= 1

        def __iter__(self) -> Iterator[str]:
            return iter([*WAN_NAMES, *(f"blocks.{index}.ffn.0.weight" for index in range(8))])

        def __len__(self) -> int:
            return len(list(iter(self)))

    tensors = Lazy()
    write_gguf(tmp_path / "model.gguf", tensors, "Q8_0", quantizer=gguf_quantizer)
    assert tensors.most <= 2  # one in hand while the loop variable still holds the last
    assert tensors.alive == 0


def test_packed_tensors_keep_every_byte(tmp_path: Path) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    kernel = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(2))
    packed = quantize_packed(weight, FORMATS["Q8_0"])
    folded = quantize_packed(kernel.view(-1, 256), FORMATS["Q4_0"])
    tensors = {
        **wan_tensors(dense=(32, 512)),
        "blocks.0.ffn.0.weight": packed,
        "blocks.0.conv.weight": PackedTensor(folded.data, folded.format, tuple(kernel.shape)),
    }
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors, None)
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}
    for name in ("blocks.0.ffn.0.weight", "blocks.0.conv.weight"):
        assert stored[name] == tensors[name].data.numpy().tobytes()
    found = read_back(path)
    assert found["dense"][0] == "BF16"
    assert np.array_equal(
        found["blocks.0.conv.weight"][1], dequantize_packed(folded).view(64, 32, 3, 3).numpy()
    )
    assert field(reader, "general.file_type") == int(gguf.LlamaFileType.MOSTLY_Q8_0)


def test_packed_tensors_of_other_formats_are_refused(tmp_path: Path) -> None:
    packed = quantize_packed(torch.ones(4, 4), scaled_format("float8_e4m3fn-rows"))
    with pytest.raises(SnugError, match="GGUF does not have; decode it first"):
        write_gguf(tmp_path / "model.gguf", {**wan_tensors(), "x": packed}, None)
    assert not list(tmp_path.iterdir())
