"""Files of the gguf package's own writer read back: every value type, alignment and tensor type."""

from __future__ import annotations

import gc
import math
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.readers import GGUFFile

gguf = pytest.importorskip("gguf")

SCALARS = [
    ("UINT8", 255),
    ("INT8", -128),
    ("UINT16", 65535),
    ("INT16", -32768),
    ("UINT32", 2**32 - 1),
    ("INT32", -(2**31)),
    ("FLOAT32", 0.5),
    ("BOOL", True),
    ("STRING", "été 日本 \x00 end"),
    ("UINT64", 2**64 - 1),
    ("INT64", -(2**63)),
    ("FLOAT64", math.pi),
]


def resident_bytes() -> int:
    """Anonymous memory of this process: what reading costs beyond the file's own pages."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("needs RssAnon in /proc/self/status")


@pytest.mark.parametrize(("value_type", "value"), SCALARS)
def test_scalar_round_trip(write_gguf: Callable[..., Path], value_type: str, value: object) -> None:
    metadata = GGUFFile(write_gguf({}, {"key": (value_type, value)})).metadata
    assert metadata["key"] == value
    assert type(metadata["key"]) is type(value)


@pytest.mark.parametrize(("value_type", "value"), SCALARS)
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_array_round_trip(
    write_gguf: Callable[..., Path], value_type: str, value: object, count: int
) -> None:
    path = write_gguf({}, {"key": ("ARRAY", [value] * count, value_type), "after": ("STRING", "found")})
    metadata = GGUFFile(path).metadata
    assert metadata["key"] == (value,) * count
    assert metadata["after"] == "found"


def test_nested_arrays_round_trip(write_gguf: Callable[..., Path]) -> None:
    nested = [[[1, 2], [3]], [[4]]]
    path = write_gguf({}, {"key": ("ARRAY", nested), "words": ("ARRAY", [["a", "b"], ["c"]])})
    assert GGUFFile(path).metadata["key"] == (((1, 2), (3,)), ((4,),))
    assert GGUFFile(path).metadata["words"] == (("a", "b"), ("c",))


def test_metadata_is_a_mapping(write_gguf: Callable[..., Path]) -> None:
    metadata = GGUFFile(write_gguf({}, {"a": ("UINT8", 1), "b": ("STRING", "x")})).metadata
    assert list(metadata) == ["general.architecture", "a", "b"]
    assert len(metadata) == 3
    assert "a" in metadata and "c" not in metadata
    assert metadata.get("c") is None
    with pytest.raises(KeyError):
        metadata["c"]


def test_empty_array(raw: Callable, save: Callable[..., Path]) -> None:
    payload = (8).to_bytes(4, "little") + (0).to_bytes(8, "little")
    assert GGUFFile(save(raw().pair("key", 9, payload))).metadata["key"] == ()


@pytest.mark.parametrize("alignment", [8, 16, 32, 64, 4096])
def test_alignment(write_gguf: Callable[..., Path], alignment: int) -> None:
    arrays = {f"t{n}": np.arange(n, dtype=np.float32) for n in (1, 3, 9, 100)}
    path = write_gguf(arrays, setup=lambda writer: writer.add_custom_alignment(alignment))
    file = GGUFFile(path)
    assert file.alignment == alignment
    for name, array in arrays.items():
        assert file.tensors[name].offset % alignment == 0
        np.testing.assert_array_equal(file.read(name).view(torch.float32).numpy(), array)


@pytest.mark.parametrize("version", [2, 3])
def test_versions(raw: Callable, save: Callable[..., Path], version: int) -> None:
    file = GGUFFile(save(raw(version=version).text("key", "value").tensor(dims=(4, 16))))
    assert file.version == version
    assert file.metadata["key"] == "value"
    assert file.tensors["w"].shape == (16, 4)


PLAIN = {"F32": "float32", "F16": "float16", "F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32"}
PLAIN["I64"] = "int64"


@pytest.mark.parametrize(("name", "dtype"), PLAIN.items())
def test_plain_types(write_gguf: Callable[..., Path], name: str, dtype: str) -> None:
    array = (np.random.default_rng(0).normal(size=(3, 5)) * 10).astype(dtype)
    file = GGUFFile(write_gguf({"w": array}))
    info = file.tensors["w"]
    assert (info.format, info.shape, info.nbytes) == (FORMATS[name], (3, 5), array.nbytes)
    assert file.read("w").numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.dtype is None])
def test_quantized_types(write_gguf: Callable[..., Path], name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, size=(3, 2 * size), dtype=np.uint8)

    def add(writer: Any) -> None:
        writer.add_tensor("w", stored, raw_dtype=kind)

    file = GGUFFile(write_gguf({}, setup=add))
    info = file.tensors["w"]
    assert (info.format, info.shape, info.nbytes) == (FORMATS[name], (3, 2 * block), stored.nbytes)
    assert file.read("w").numpy().tobytes() == stored.tobytes()


def test_same_as_the_package_reader(write_gguf: Callable[..., Path]) -> None:
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    path = write_gguf({"a": values, "b.weight": (values, "Q8_0"), "c": (values, "BF16"), "d": values[0]})
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.read(tensor.name).numpy().tobytes() == tensor.data.tobytes()


def test_empty_and_scalar_tensors(raw: Callable, save: Callable[..., Path]) -> None:
    file = GGUFFile(save(raw(data=bytes(32)).tensor("none", dims=(0, 3)).tensor("one", dims=())))
    assert (file.tensors["none"].shape, file.tensors["none"].nbytes) == ((3, 0), 0)
    assert file.read("none").shape == (0,)
    assert (file.tensors["one"].shape, file.tensors["one"].nbytes) == ((), 4)


def test_tensors_outlive_the_file(write_gguf: Callable[..., Path]) -> None:
    with GGUFFile(write_gguf({"w": np.arange(64, dtype=np.float32)}, {"key": ("STRING", "x")})) as file:
        tensor, metadata = file.read("w"), file.metadata
    with pytest.raises(ValueError, match="is closed"):
        file.read("w")
    del file
    gc.collect()
    assert tensor.view(torch.float32).sum() == 2016
    assert metadata["key"] == "x"


def test_writing_to_a_tensor_never_reaches_the_file(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf({"w": np.ones(64, dtype=np.float32)})
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about buffers it must not write to
        GGUFFile(path).read("w").zero_()
    assert path.read_bytes() == before


def test_reading_costs_no_memory(raw: Callable, save: Callable[..., Path]) -> None:
    size = 1 << 28
    path = save(raw(data=b"").tensor(dims=(size // 4,)))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)  # sparse
    before = resident_bytes()
    tensor = GGUFFile(path).read("w")
    assert tensor[::4096].sum() == 0  # touches every page
    assert resident_bytes() - before < 1 << 24
    path.unlink()


def test_a_large_vocabulary_opens_fast(raw: Callable, save: Callable[..., Path]) -> None:
    count = 150_000
    words = b"".join(struct.pack("<Q6s", 6, b"%06d" % index) for index in range(count))
    array = struct.pack("<IQ", 8, count) + words
    path = save(raw().pair("tokens", 9, array).pair("merges", 9, array))
    times = []
    for _ in range(5):
        started = time.process_time()
        file = GGUFFile(path)
        times.append(time.process_time() - started)
    assert min(times) < 0.1
    assert file.metadata["merges"] == tuple(f"{index:06d}" for index in range(count))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system decides")
def test_a_file_larger_than_memory_opens(raw: Callable, save: Callable[..., Path]) -> None:
    size = 1 << 40
    path = save(raw(data=b"").tensor(dims=(size,), ggml_type=24))
    try:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size + size)  # sparse
    except OSError as error:
        pytest.skip(f"this file system holds no file of 1 TiB: {error}")
    assert GGUFFile(path).read("w")[-4096:].sum() == 0
    path.unlink()  # whatever copies the test's folder might not keep it sparse
