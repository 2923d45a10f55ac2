"""bitsandbytes' NF4 and FP4: 4-bit indices into a map of 16 values, blocks scaled by their largest magnitude.

Layout (bitsandbytes.functional.QuantState.as_dict), the weight flattened, blocks crossing rows::

    data              uint8 [ceil(numel / 2)]       weight 2i in the high nibble, 2i + 1 in the low one
    quant_map         float32 [16]
    absmax            float [blocks]                plain; the last block may be partial
    absmax            uint8 [blocks]                nested ("double quantization"), and then also:
    nested_absmax     float32 [ceil(blocks / nested block size)]
    nested_quant_map  float32 [256]
    nested_offset     float32 [1]

    absmax_b = nested_quant_map[absmax[b]] * nested_absmax[b // nested block size] + nested_offset
    w_i      = quant_map[nibble_i] * absmax_{i // block size}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.errors import SnugError
from .base import Scratch
from .four_bit_encoder import FourBitEncoder
from .scaled_base import FLOATS, ScaledFormat, repeated, rows_and_columns

if TYPE_CHECKING:
    from ..core.packed import PackedTensor

_NAME = re.compile(r"bnb-(nf4|fp4)-([1-9]\d{0,8})(?:-nested-([1-9]\d{0,8}))?")


@dataclass(frozen=True, slots=True)
class BitsAndBytes4Bit(ScaledFormat):
    """quant_type: "nf4" or "fp4"; block_size: weights per absmax; nested: absmax values per scale, 0 when plain."""

    quant_type: str
    block_size: int
    nested: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise SnugError(
                f"A {self.name} block must have an even number of weights, got {self.block_size}."
            )

    @property
    def name(self) -> str:
        return f"bnb-{self.quant_type}-{self.block_size}" + (f"-nested-{self.nested}" if self.nested else "")

    @property
    def part_names(self) -> tuple[str, ...]:
        nested = ("nested_absmax", "nested_quant_map", "nested_offset") if self.nested else ()
        return ("absmax", "quant_map", *nested)

    @classmethod
    def parse(cls, name: str) -> BitsAndBytes4Bit | None:
        match = _NAME.fullmatch(name)
        return cls(match[1], int(match[2]), int(match[3] or 0)) if match else None

    def check_parts(self, packed: PackedTensor) -> None:
        weights, parts = math.prod(packed.shape), packed.parts
        blocks = -(-weights // self.block_size)
        self.expect(packed, "data", packed.data, -(-weights // 2), (torch.uint8,))
        self.expect(packed, "quant_map", parts["quant_map"], 16, (torch.float32,))
        self.expect(packed, "absmax", parts["absmax"], blocks, (torch.uint8,) if self.nested else FLOATS)
        if self.nested:
            scales = -(-blocks // self.nested)
            self.expect(packed, "nested_absmax", parts["nested_absmax"], scales, (torch.float32,))
            self.expect(packed, "nested_quant_map", parts["nested_quant_map"], 256, (torch.float32,))
            self.expect(packed, "nested_offset", parts["nested_offset"], 1, (torch.float32,))

    def encoder(self) -> FourBitEncoder:
        return FourBitEncoder(self)

    def decode_rows(
        self,
        data: torch.Tensor,
        parts: Mapping[str, torch.Tensor],
        shape: Sequence[int],
        start: int,
        stop: int,
        out: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        _, columns = rows_and_columns(shape)
        first, last = start * columns, stop * columns
        begin, end = first // self.block_size, -(-last // self.block_size)  # in blocks
        nibbles = data.view(-1)[begin * self.block_size // 2 : end * self.block_size // 2]
        count, skipped = 2 * nibbles.numel(), first - begin * self.block_size
        # Pairs are written as one 64-bit word each, which torch looks up several times faster than rows of two.
        direct = skipped == 0 and count == last - first and out.storage_offset() % 2 == 0
        values = out.view(-1) if direct else scratch.get("values", (count,), torch.float32)
        index = scratch.get("index", (nibbles.numel(),), torch.int32).copy_(nibbles)
        torch.index_select(_pairs(parts["quant_map"], scratch), 0, index, out=values.view(torch.int64))
        absmax = self.plain_absmax(parts, begin, end)
        whole = count // self.block_size
        values[: whole * self.block_size].view(whole, self.block_size).mul_(absmax[:whole, None])
        if whole * self.block_size < count:
            values[whole * self.block_size :].mul_(absmax[whole])
        if not direct:
            out.view(-1).copy_(values[skipped : skipped + last - first])

    def plain_absmax(self, parts: Mapping[str, torch.Tensor], begin: int, end: int) -> torch.Tensor:
        """float32 [end - begin]: the largest magnitudes of the blocks begin..end, nested ones worked out."""
        absmax = parts["absmax"].view(-1)[begin:end]
        if not self.nested:
            return absmax.float()
        values = torch.index_select(parts["nested_quant_map"].view(-1), 0, absmax.int())
        scales = repeated(parts["nested_absmax"].view(-1), self.nested, begin, end)
        return values.mul_(scales).add_(parts["nested_offset"].view(()))


def _pairs(quant_map: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """int64 [256]: for every byte its two weights (float32), so that one look-up yields both."""
    pairs = scratch.get("pairs", (16, 16, 2), torch.float32)
    pairs[:, :, 0] = quant_map.view(16, 1)
    pairs[:, :, 1] = quant_map.view(16)
    return pairs.view(torch.int64).view(-1)
