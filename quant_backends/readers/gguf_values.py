"""Bounds-checked reading of GGUF primitives and of the metadata section.

Layout (ggml's docs/gguf.md), all integers little-endian::

    string   uint64 length, then that many bytes of UTF-8, no terminator
    value    uint32 type, then the payload of that type
    array    uint32 element type, uint64 count, then count payloads without their types
    pair     string key, then value

Opening a file only walks over the values to find where each one starts; nothing is decoded until a key is
looked up, because a tokenizer's vocabulary holds hundreds of thousands of strings that most callers never ask
for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import NoReturn, cast

from ..core.errors import FileFormatError

MetadataValue = int | float | bool | str | tuple["MetadataValue", ...]

REDOWNLOAD = "the file is damaged or incomplete: download it again"

# ggml itself writes no nested arrays; the specification allows them, so a small depth is enough for any real
# file.
MAX_ARRAY_DEPTH = 8
# The specification's limit for keys; tensor names are far shorter in practice.
MAX_NAME_BYTES = 65535


class ValueType(IntEnum):
    """Type numbers of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct codes of the values whose size is fixed; strings and arrays carry their own lengths.
FIXED_CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
FIXED_SIZES = {value_type: struct.calcsize("<" + code) for value_type, code in FIXED_CODES.items()}
INTEGER_TYPES = {kind for kind, code in FIXED_CODES.items() if code in "BbHhIiQq"}

# Fewest bytes one value can take: what an element count is checked against before anything loops over it.
MIN_SIZES = {**FIXED_SIZES, ValueType.STRING: 8, ValueType.ARRAY: 12}

# Names longer than this are cut in messages: a damaged file may hold any 64 KiB of text as one.
MAX_SHOWN_CHARACTERS = 150

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def shown(name: str) -> str:
    """A key or tensor name as it appears in messages: quoted, on one line, of a sane length."""
    return repr(name if len(name) <= MAX_SHOWN_CHARACTERS else name[:MAX_SHOWN_CHARACTERS] + "…")


class ByteCursor:
    """A read position in a buffer; every step is checked against the end and fails with `FileFormatError`."""

    __slots__ = ("buffer", "end", "path", "position")

    def __init__(self, buffer: memoryview, path: Path, position: int = 0) -> None:
        self.buffer = buffer
        self.path = path
        self.position = position
        self.end = len(buffer)

    def fail(self, problem: str, hint: str = REDOWNLOAD) -> NoReturn:
        raise FileFormatError(self.path, problem, hint)

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes and return where they start."""
        start = self.position
        if size > self.end - start:
            self.fail(f"{what} at byte {start} needs {size} bytes but only {self.end - start} are left")
        self.position = start + size
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.buffer, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.buffer, self.take(8, what))[0]

    def count(self, what: str, min_size: int) -> int:
        """A uint64 count of things of at least `min_size` bytes each, refused when they cannot fit in the file."""
        found = self.u64(what)
        if found > (self.end - self.position) // min_size:
            self.fail(f"{what} is {found}, more than the remaining {self.end - self.position} bytes can hold")
        return found

    def text(self, what: str) -> str:
        size = self.u64(f"the length of {what}")
        start = self.take(size, what)
        try:
            return str(self.buffer[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} at byte {start} is not valid UTF-8 ({error.reason})")

    def name(self, what: str) -> str:
        """A key or tensor name: a string that is short and not empty."""
        start = self.position
        found = self.text(what)
        if not 0 < self.position - start - 8 <= MAX_NAME_BYTES:
            self.fail(
                f"{what} at byte {start} has {self.position - start - 8} bytes, expected 1 to {MAX_NAME_BYTES}"
            )
        return found

    def value_type(self, what: str) -> ValueType:
        number = self.u32(f"the type of {what}")
        try:
            return ValueType(number)
        except ValueError:
            self.fail(f"{what} has the unknown value type {number}, expected 0 to {max(ValueType)}")

    def skip_value(self, value_type: ValueType, what: str, depth: int = 0) -> None:
        """Step over one payload without decoding it."""
        if value_type is ValueType.STRING:
            self.take(self.u64(f"the length of {what}"), what)
        elif value_type is ValueType.ARRAY:
            element, count = self._array_header(what, depth)
            if element is ValueType.STRING:
                self._skip_strings(count, what)
            elif element is ValueType.ARRAY:
                for _ in range(count):
                    self.skip_value(element, what, depth + 1)
            else:
                self.take(count * FIXED_SIZES[element], what)
        else:
            self.take(FIXED_SIZES[value_type], what)

    def read_value(self, value_type: ValueType, what: str, depth: int = 0) -> MetadataValue:
        """Decode one payload; arrays become tuples."""
        if value_type is ValueType.STRING:
            return self.text(what)
        if value_type is not ValueType.ARRAY:
            start = self.take(FIXED_SIZES[value_type], what)
            return struct.unpack_from("<" + FIXED_CODES[value_type], self.buffer, start)[0]
        element, count = self._array_header(what, depth)
        if element is ValueType.STRING:
            return self._read_strings(count, what)
        if element is ValueType.ARRAY:
            return tuple(self.read_value(element, what, depth + 1) for _ in range(count))
        start = self.take(count * FIXED_SIZES[element], what)
        return struct.unpack_from(f"<{count}{FIXED_CODES[element]}", self.buffer, start)

    def _array_header(self, what: str, depth: int) -> tuple[ValueType, int]:
        if depth >= MAX_ARRAY_DEPTH:
            self.fail(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH} levels")
        element = self.value_type(f"the elements of {what}")
        return element, self.count(f"the element count of {what}", MIN_SIZES[element])

    def _skip_strings(self, count: int, what: str) -> None:
        # The hot loop of opening a file. It checks no bound itself: the position only grows, so a length that
        # points outside makes the next unpack fail, or leaves the position behind the end when it was the
        # last.
        unpack, buffer, position = _U64.unpack_from, self.buffer, self.position
        try:
            for _ in range(count):
                position += 8 + unpack(buffer, position)[0]
        except (struct.error, OverflowError, IndexError):
            position = self.end + 1
        if position > self.end:
            self.fail(f"a string in {what} reaches past the end of the file")
        self.position = position

    def _read_strings(self, count: int, what: str) -> tuple[str, ...]:
        # Skipping first checks every bound, so that the loop over a whole vocabulary can do without.
        unpack, buffer, position = _U64.unpack_from, self.buffer, self.position
        self._skip_strings(count, what)
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(buffer, position)[0]
                strings.append(str(buffer[start:position], "utf-8"))
        except UnicodeDecodeError as error:
            self.fail(f"{what} at byte {start} is not valid UTF-8 ({error.reason})")
        return tuple(strings)


class Metadata(Mapping[str, MetadataValue]):
    """The key-value section of a GGUF file; values are decoded at each look-up and are not kept.

    Numbers come back as int, float or bool, strings as str, arrays as tuples. Looking up a key raises
    KeyError when it is absent and `FileFormatError` when its value does not decode.
    """

    __slots__ = ("_buffer", "_path", "_places")

    def __init__(self, cursor: ByteCursor, count: int) -> None:
        self._buffer = cursor.buffer
        self._path = cursor.path
        self._places: dict[str, tuple[ValueType, int]] = {}
        for index in range(count):
            key = cursor.name(f"metadata key {index}")
            if key in self._places:
                cursor.fail(f"the metadata key {shown(key)} appears twice")
            what = f"metadata {shown(key)}"
            value_type = cursor.value_type(what)
            self._places[key] = (value_type, cursor.position)
            cursor.skip_value(value_type, what)

    def __getitem__(self, key: str) -> MetadataValue:
        value_type, position = self._places[key]
        return ByteCursor(self._buffer, self._path, position).read_value(value_type, f"metadata {shown(key)}")

    def integer(self, key: str, default: int) -> int:
        """The whole number stored under `key`, or `default` when the key is absent."""
        if key not in self._places:
            return default
        value_type, position = self._places[key]
        if value_type not in INTEGER_TYPES:
            problem = f"metadata {shown(key)} has the type {value_type.name}, expected a whole number"
            raise FileFormatError(self._path, problem, REDOWNLOAD)
        return cast(int, ByteCursor(self._buffer, self._path, position).read_value(value_type, key))

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
