"""The tensor table of a GGUF file: what each entry says, checked before anything is computed from it.

One entry (ggml's docs/gguf.md): string name, uint32 n_dims, uint64 dims[n_dims] (fastest first), uint32 ggml
type, uint64 offset from the start of the data section.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..formats import Format, format_by_ggml_type
from .gguf_values import ByteCursor, shown

# ggml stops at 4, but video models are published with their 5-D patch embeddings added by a second tool.
MAX_DIMS = 8
# ggml counts elements and bytes in int64.
MAX_ELEMENTS = (1 << 63) - 1

# Real names have up to some 150 characters; patterns that look for parts of them need a bound.
MAX_TENSOR_NAME = 1024
# The shortest entry: name length, one character of name, dimension count, type, offset.
MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8

# Types that ggml has removed, by number; their files load in nothing current.
REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file.

    `shape` is in torch order (ggml's dims reversed), `offset` counts bytes from the start of the file.
    """

    name: str
    format: type[Format]
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_tensor_infos(cursor: ByteCursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Read `count` entries and place them behind the table: the data starts at the next multiple of `alignment`."""
    relative: dict[str, TensorInfo] = {}
    for index in range(count):
        info = _read_tensor_info(cursor, index, alignment)
        if info.name in relative:
            cursor.fail(f"the tensor name {shown(info.name)} appears twice")
        relative[info.name] = info
    data_start = -(-cursor.position // alignment) * alignment
    return {name: _placed(info, data_start, cursor) for name, info in relative.items()}


def _read_tensor_info(cursor: ByteCursor, index: int, alignment: int) -> TensorInfo:
    """One entry of the tensor table; its offset is still relative to the data section."""
    name = cursor.name(f"the name of tensor {index}")
    what = f"tensor {shown(name)}"
    if len(name) > MAX_TENSOR_NAME:
        cursor.fail(f"the name of {what} has {len(name)} characters, expected at most {MAX_TENSOR_NAME}")
    n_dims = cursor.u32(f"the dimension count of {what}")
    if n_dims > MAX_DIMS:
        cursor.fail(f"{what} has {n_dims} dimensions, expected at most {MAX_DIMS}")
    dims = [cursor.u64(f"a dimension of {what}") for _ in range(n_dims)]
    shape = tuple(reversed(dims))
    if not is_possible(dims):
        cursor.fail(f"{what} has the impossible shape {shape}")
    fmt = _format_of(cursor, what, cursor.u32(f"the type of {what}"))
    row = dims[0] if dims else 1
    if row % fmt.block_size:
        cursor.fail(
            f"{what} has rows of {row} elements, expected a multiple of {fmt.name}'s {fmt.block_size}"
        )
    offset = cursor.u64(f"the offset of {what}")
    if offset % alignment:
        cursor.fail(f"{what} is at offset {offset}, expected a multiple of the alignment {alignment}")
    return TensorInfo(name, fmt, shape, offset, math.prod(dims) // fmt.block_size * fmt.block_bytes)


def is_possible(dims: Iterable[int]) -> bool:
    """Whether ggml and torch can count the elements of a tensor.

    A dimension of 0 leaves no elements but must not hide others: torch's strides overflow all the same.
    """
    return math.prod(max(dim, 1) for dim in dims) <= MAX_ELEMENTS


def _format_of(cursor: ByteCursor, what: str, ggml_type: int) -> type[Format]:
    try:
        return format_by_ggml_type(ggml_type)
    except KeyError:
        pass
    if ggml_type in REMOVED_TYPES:
        cursor.fail(
            f"{what} has the type {REMOVED_TYPES[ggml_type]} ({ggml_type}), which ggml has removed",
            "download a newer conversion of the model or quantize it again",
        )
    cursor.fail(
        f"{what} has the unknown ggml type {ggml_type}",
        "update this node pack or use a model quantized to another type; the file may also be damaged",
    )


def _placed(info: TensorInfo, data_start: int, cursor: ByteCursor) -> TensorInfo:
    """The same tensor with its absolute offset, once its bytes are known to lie in the file."""
    offset = data_start + info.offset
    if offset + info.nbytes > cursor.end:
        cursor.fail(
            f"tensor {shown(info.name)} needs bytes {offset} to {offset + info.nbytes} "
            f"but the file ends at {cursor.end}"
        )
    return TensorInfo(info.name, info.format, info.shape, offset, info.nbytes)
