"""Every way a file can be wrong: the message names the file, what was found, what was expected and what to do."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snug.quant_backends.core.errors import FileFormatError, SnugError
from snug.quant_backends.readers import GGUFFile

REDOWNLOAD = "download it again"
HUGE = 2**64 - 1
ARRAY, STRING, UINT32, UINT8 = 9, 8, 4, 0


def array(element: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", element, count) + payload


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


# Name of the case: what to build from a consistent file, then what the message must say, in this order.
CASES: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "other magic": (lambda raw: raw(magic=b"ABCD"), ["b'ABCD'", "b'GGUF'", "choose a GGUF model file"]),
    "before GGUF": (lambda raw: raw(magic=b"tjgg"), ["GGJT", "download a GGUF version"]),
    "Git LFS pointer": (
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        ["Git LFS pointer", "download the file itself"],
    ),
    "web page": (lambda raw: b"<!DOCTYPE html><html></html>", ["web page", "download the file itself"]),
    "PyTorch file": (lambda raw: b"PK\x03\x04" + bytes(64), ["PyTorch", "expected a GGUF model"]),
    "cut in the header": (lambda raw: b"GGUF\x03\0\0\0\x01\0", ["needs 8 bytes", "2 are left", REDOWNLOAD]),
    "version 1": (lambda raw: raw(version=1), ["version 1", "expected 2 or 3", "newer conversion"]),
    "version 0": (lambda raw: raw(version=0), ["version 0", "expected 2 or 3"]),
    "version 4": (lambda raw: raw(version=4), ["version 4", "expected 2 or 3", "update this node pack"]),
    "big-endian": (
        lambda raw: raw(version=3 << 24),
        ["big-endian GGUF version 3", "little-endian", "gguf_convert_endian.py"],
    ),
    "absurd tensor count": (
        lambda raw: raw(tensor_count=HUGE),
        ["tensor count", str(HUGE), "remaining", REDOWNLOAD],
    ),
    "absurd pair count": (lambda raw: raw(pair_count=HUGE), ["metadata count", str(HUGE), REDOWNLOAD]),
    "more pairs than there are": (
        lambda raw: raw(pair_count=3, data=bytes(256)),
        ["metadata key 0", "0 bytes"],
    ),
    "key past the end": (
        lambda raw: raw(pairs=[struct.pack("<Q", HUGE) + bytes(32)]),
        ["metadata key 0", f"needs {HUGE} bytes", "left"],
    ),
    "key too long": (lambda raw: raw().text("k" * 65536, ""), ["65536 bytes", "expected 1 to 65535"]),
    "key not UTF-8": (lambda raw: raw().text(b"\xff\xfe", ""), ["metadata key 0", "UTF-8"]),
    "duplicate key": (lambda raw: raw().text("k", "").text("k", ""), ["key 'k' appears twice", REDOWNLOAD]),
    "unknown value type": (lambda raw: raw().pair("k", 13, bytes(8)), ["'k'", "type 13", "expected 0 to 12"]),
    "unknown element type": (lambda raw: raw().pair("k", ARRAY, array(99, 1)), ["'k'", "type 99"]),
    "string past the end": (
        lambda raw: raw().pair("k", STRING, struct.pack("<Q", HUGE)),
        ["'k'", f"needs {HUGE} bytes"],
    ),
    "absurd element count": (
        lambda raw: raw().pair("k", ARRAY, array(UINT8, HUGE)),
        ["element count of metadata 'k'", str(HUGE), "remaining"],
    ),
    "absurd string count": (
        lambda raw: raw().pair("k", ARRAY, array(STRING, 1 << 40)),
        ["element count of metadata 'k'", str(1 << 40)],
    ),
    "string element past the end": (
        lambda raw: raw().pair("k", ARRAY, array(STRING, 2, text(b"a") + struct.pack("<Q", HUGE))),
        ["string in metadata 'k'", "past the end", REDOWNLOAD],
    ),
    "last string element past the end": (
        lambda raw: raw().pair("k", ARRAY, array(STRING, 1, struct.pack("<Q", 1 << 20))),
        ["string in metadata 'k'", "past the end"],
    ),
    "arrays nested too deep": (
        lambda raw: raw().pair("k", ARRAY, array(ARRAY, 1) * 8 + array(UINT8, 0)),
        ["'k'", "deeper than 8 levels"],
    ),
    "alignment 0": (lambda raw: raw().pair("general.alignment", UINT32, bytes(4)), ["is 0", "power of two"]),
    "alignment 48": (
        lambda raw: raw().pair("general.alignment", UINT32, struct.pack("<I", 48)),
        ["'general.alignment' is 48", "power of two from 8 to"],
    ),
    "alignment 2**31": (
        lambda raw: raw().pair("general.alignment", UINT32, struct.pack("<I", 1 << 31)),
        [f"is {1 << 31}", "power of two"],
    ),
    "alignment as text": (
        lambda raw: raw().text("general.alignment", "32"),
        ["'general.alignment'", "type STRING", "whole number"],
    ),
    "split": (
        lambda raw: raw().pair("split.count", 2, struct.pack("<H", 3)),
        ["one of 3 parts", "llama-gguf-split --merge"],
    ),
    "tensor name not UTF-8": (lambda raw: raw().tensor(b"\xff"), ["name of tensor 0", "UTF-8"]),
    "tensor name too long": (lambda raw: raw().tensor("n" * 1025), ["has 1025 characters", "at most 1024"]),
    "empty tensor name": (lambda raw: raw().tensor(""), ["name of tensor 0", "has 0 bytes", "expected 1"]),
    "duplicate tensor": (lambda raw: raw().tensor().tensor(), ["tensor name 'w' appears twice", REDOWNLOAD]),
    "too many dimensions": (lambda raw: raw().tensor(dims=[1] * 9), ["'w'", "9 dimensions", "at most 8"]),
    "absurd dimension count": (
        lambda raw: raw(tensors=[text(b"w") + b"\xff" * 4 + bytes(64)]),
        ["'w'", f"{2**32 - 1} dimensions"],
    ),
    "dimension product overflows": (
        lambda raw: raw().tensor(dims=[1 << 32, 1 << 32]),
        ["'w'", "impossible shape", f"({1 << 32}, {1 << 32})"],
    ),
    "zero hides a huge dimension": (lambda raw: raw().tensor(dims=[0, HUGE]), ["'w'", "impossible shape"]),
    "zero hides an overflow": (
        lambda raw: raw().tensor(dims=[0, 1 << 40, 1 << 40]),
        ["'w'", "impossible shape"],
    ),
    "removed type": (
        lambda raw: raw().tensor(ggml_type=31),
        ["'w'", "Q4_0_4_4 (31)", "removed", "quantize it again"],
    ),
    "unknown type": (
        lambda raw: raw().tensor(ggml_type=999),
        ["'w'", "ggml type 999", "update this node pack"],
    ),
    "row is no whole number of blocks": (
        lambda raw: raw().tensor(dims=[33, 32], ggml_type=8),
        ["'w'", "rows of 33", "Q8_0's 32"],
    ),
    "scalar of a block type": (
        lambda raw: raw().tensor(dims=[], ggml_type=8),
        ["'w'", "rows of 1", "Q8_0's 32"],
    ),
    "offset not aligned": (lambda raw: raw().tensor(offset=8, dims=[1]), ["'w'", "offset 8", "alignment 32"]),
    "data past the end": (
        lambda raw: raw(data=bytes(252)).tensor(dims=[64]),
        ["'w' needs bytes 64 to 320", "ends at 316", REDOWNLOAD],
    ),
    "offset past the end": (
        lambda raw: raw().tensor(offset=HUGE & -32),
        ["'w' needs bytes", "the file ends at", REDOWNLOAD],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(raw: type, save: Callable[..., Path], case: str) -> None:
    build, expected = CASES[case]
    path = save(build(raw))
    with pytest.raises(FileFormatError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.endswith(".") and "\n" not in message
    assert re.search(".*".join(map(re.escape, expected)), message), message
    assert isinstance(caught.value, SnugError)


@pytest.mark.parametrize("number", [4, 5, 31, 32, 33, 36, 37, 38])
def test_every_removed_type_is_named(raw: type, save: Callable[..., Path], number: int) -> None:
    with pytest.raises(
        FileFormatError, match=rf"'w' has the type I?Q4_\w+ \({number}\), which ggml has removed"
    ):
        GGUFFile(save(raw().tensor(ggml_type=number)))


def test_split_by_name(raw: type, save: Callable[..., Path]) -> None:
    with pytest.raises(FileFormatError, match="one of 3 parts"):
        GGUFFile(save(raw().tensor(), "model-00001-of-00003.gguf"))
    GGUFFile(save(raw().tensor(), "model-00001-of-00001.gguf"))
    merged = raw().pair("split.count", 2, struct.pack("<H", 1)).tensor()
    GGUFFile(save(merged, "merged-00001-of-00003.gguf"))


def test_long_names_do_not_fill_the_message(raw: type, save: Callable[..., Path]) -> None:
    with pytest.raises(FileFormatError) as caught:
        GGUFFile(save(raw().tensor("n\n" * 20000, ggml_type=999)))
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value_type", "payload"),
    [
        (STRING, text(b"\xff\xfe")),
        (ARRAY, array(STRING, 2, text(b"fine") + text(b"\xff"))),
    ],
)
def test_values_are_checked_when_asked_for(
    raw: type, save: Callable[..., Path], value_type: int, payload: bytes
) -> None:
    file = GGUFFile(save(raw().pair("k", value_type, payload)))
    with pytest.raises(FileFormatError, match="metadata 'k' at byte .* is not valid UTF-8"):
        file.metadata["k"]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        FileFormatError, match=r"absent\.gguf: the file cannot be opened \(No such file.*check the path"
    ):
        GGUFFile(tmp_path / "absent.gguf")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be opened"):
        GGUFFile(tmp_path)


def test_empty_file(save: Callable[..., Path]) -> None:
    with pytest.raises(FileFormatError, match="the file is empty; .*download it again"):
        GGUFFile(save(b""))


def test_unreadable_file(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = save(b"GGUF")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(
        FileFormatError, match=r"cannot be opened \(Permission denied\); check the path and its perm"
    ):
        GGUFFile(path)
