"""Types that torch has itself: a block is one element, little-endian."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import Format


class _Plain(Format):
    block_size = 1
    dtype: ClassVar[torch.dtype]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.block_bytes = cls.dtype.itemsize

    @classmethod
    def dequantize_blocks(cls, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks (uint8 [n, itemsize]) as [n, 1]: float64 for F64 and I64, which float32 cannot hold."""
        return (
            blocks.contiguous().view(cls.dtype).to(torch.float64 if cls.block_bytes == 8 else torch.float32)
        )


class F32(_Plain):
    ggml_type = 0
    dtype = torch.float32

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return values.contiguous().view(torch.uint8)


class F16(_Plain):
    ggml_type = 1
    dtype = torch.float16

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return values.to(torch.float16).view(torch.uint8)


class I8(_Plain):
    ggml_type = 24
    dtype = torch.int8


class I16(_Plain):
    ggml_type = 25
    dtype = torch.int16


class I32(_Plain):
    ggml_type = 26
    dtype = torch.int32


class I64(_Plain):
    ggml_type = 27
    dtype = torch.int64


class F64(_Plain):
    ggml_type = 28
    dtype = torch.float64


class BF16(_Plain):
    ggml_type = 30
    dtype = torch.bfloat16

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        rounded = values.to(torch.bfloat16)
        nan = rounded.isnan()
        if values.device.type == "cpu" and not nan.any():
            return rounded.view(torch.uint8)
        # torch makes every NaN the same; ggml keeps its sign and payload.
        bits = values.contiguous().view(torch.int32)
        kept = ((bits >> 16) | 64).to(torch.int16)
        return torch.where(nan, kept, rounded.view(torch.int16)).view(torch.uint8)


# Plain types of 16 bits as formats: a weight that stays as it is in its file is packed like any other.
HALVES: dict[torch.dtype, type[Format]] = {torch.float16: F16, torch.bfloat16: BF16}
