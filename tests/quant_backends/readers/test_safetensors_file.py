from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.readers.safetensors_file import DTYPES, MAX_HEADER_BYTES, SafetensorsFile

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def file_of(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], SafetensorsFile]:
    def open_content(content: bytes) -> SafetensorsFile:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return SafetensorsFile(path)

    return open_content


def test_every_dtype_reads_what_the_library_wrote(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    raw = torch.randint(0, 100, (4, 16), dtype=torch.uint8)
    tensors = {name: raw.clone().view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"}
    tensors |= {"BOOL": raw > 50, "empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)}
    path = tmp_path / "model.safetensors"
    library.save_file(tensors, path, metadata={"key": "value"})
    file = SafetensorsFile(path)
    assert file.metadata == {"key": "value"}
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        if name != "BOOL" and found.numel():
            found, tensor = found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(found, tensor)


def test_tensors_are_views_that_outlive_the_file_object(opened: Callable[[bytes], SafetensorsFile]) -> None:
    tensor = opened(file_of(json.dumps(GOOD).encode().ljust(64), struct.pack("<2f", 1, 2))).read("a")
    assert tensor.tolist() == [1, 2]


def test_unaligned_tensors_are_read(opened: Callable[[bytes], SafetensorsFile]) -> None:
    for padding in range(8):
        text = json.dumps(GOOD).encode() + b" " * padding
        assert opened(file_of(text, struct.pack("<2f", 1, 2))).read("a").tolist() == [1, 2]


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": GOOD["a"] | changes}


MALFORMED = [
    (b"", "the file is empty"),
    (b"\x01", "the header has 0 bytes|the header is not valid JSON|expected at most 0"),
    (b"{}", "expected at most|not valid JSON"),
    (struct.pack("<Q", 1 << 63) + b"{}", "the header has 9223372036854775808 bytes, expected at most 2"),
    (struct.pack("<Q", 3) + b"{}", "the header has 3 bytes, expected at most 2"),
    (file_of(b"[]"), "not a JSON object"),
    (file_of(b'{"a": NaN}'), "NaN is not JSON"),
    (file_of(b'{"a": 1'), "not valid JSON"),
    (file_of(b'{"\xff": 1}'), "not valid JSON"),
    (file_of(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    (file_of(b'{"a": {}, "a": {}}'), "a name appears twice"),
    (file_of({"__metadata__": {"a": 1}}), "mapping of text to text"),
    (file_of({"__metadata__": []}), "mapping of text to text"),
    (file_of({"a": []}), "lacks dtype, shape or data_offsets"),
    (file_of({"a": {"dtype": "F32", "shape": [2]}}), "lacks dtype, shape or data_offsets"),
    (file_of({"n" * 1025: GOOD["a"]}), "has 1025 characters, expected at most 1024"),
    (file_of(entry(dtype="Q4_K")), "unknown dtype 'Q4_K'"),
    (file_of(entry(dtype=[])), "unknown dtype"),
    (file_of(entry(shape=[-2])), "impossible shape"),
    (file_of(entry(shape=[True, 2])), "impossible shape"),
    (file_of(entry(shape=[1] * 9)), "impossible shape"),
    (file_of(entry(shape=[0, 1 << 62, 4], data_offsets=[0, 0])), "impossible shape"),
    (file_of(entry(shape=2)), "impossible shape"),
    (file_of(entry(data_offsets=[8, 0])), "its offsets span -8"),
    (file_of(entry(data_offsets=[0])), "impossible offsets"),
    (file_of(entry(data_offsets=[-8, 0])), "impossible offsets"),
    (file_of(entry(data_offsets=[0.0, 8.0])), "impossible offsets"),
    (file_of(entry(shape=[3])), "takes 12 bytes, but its offsets span 8"),
    (file_of(GOOD, bytes(7)), "ends at byte .* but the file ends at"),
    (file_of(GOOD | {"b": GOOD["a"]}), "the tensors 'a' and 'b' overlap"),
    (b"GGUF" + bytes(100), "is a GGUF model, expected safetensors; give it the ending .gguf"),
    (
        pickle.dumps({"a": 1}, protocol=2) + bytes(20),
        "PyTorch pickle, expected safetensors; convert it to safetensors",
    ),
    (b"PK\x03\x04" + bytes(100), "PyTorch pickle"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"<!DOCTYPE html><html></html>", "a web page"),
]


@pytest.mark.parametrize(("content", "sentence"), MALFORMED, ids=[sentence[:40] for _, sentence in MALFORMED])
def test_malformed(content: bytes, sentence: str, opened: Callable[[bytes], SafetensorsFile]) -> None:
    with pytest.raises(FileFormatError, match=sentence):
        opened(content)


def test_a_header_above_the_limit_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(FileFormatError, match="expected at most 100000000"):
        SafetensorsFile(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "none.safetensors")
