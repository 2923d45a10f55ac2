"""ggml's first formats: blocks of 32 weights with one float16 scale `d` (and a minimum `m` in the _1 types).

Layouts: `block_q4_0` … `block_q8_0` in ggml-common.h; the order of operations follows the gguf package, to
which results are equal bit for bit.
"""

from __future__ import annotations

import torch

from .base import Format, Scratch


class Q4_0(Format):
    """d f16 | qs 16 bytes: weight j in the low nibble of byte j, weight j+16 in its high nibble; d * (q - 8)."""

    ggml_type, block_size, block_bytes = 2, 32, 18

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        d = blocks[:, :2].view(torch.float16).float()
        qs = blocks[:, 2:]
        torch.mul((qs & 15).view(torch.int8) - 8, d, out=out[:, :16])
        torch.mul((qs >> 4).view(torch.int8) - 8, d, out=out[:, 16:])


class Q8_0(Format):
    """d f16 | qs 32 x int8; d * q."""

    ggml_type, block_size, block_bytes = 8, 32, 34

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        d = blocks[:, :2].view(torch.float16).float()
        torch.mul(blocks[:, 2:].view(torch.int8), d, out=out)
