"""bitsandbytes' NF4 and FP4: bitsandbytes.functional.quantize_4bit as it is on a CPU, bit for bit.

Its kernels for GPUs are others and may round a weight in the middle between two values the other way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from .row_encoder import DATA, RowEncoder, Tensors

if TYPE_CHECKING:
    from .bitsandbytes_4bit import BitsAndBytes4Bit

# functional.get_4bit_type; FP4's values are twelfths, index bits are sign, exponent, exponent, mantissa.
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
VALUES = {
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
    + (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
    + (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941)
    + (0.7229568362236023, 1.0),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in _FP4),
}
# What quantize_4bit always nests with, whatever the block size of the weights.
NESTED_BLOCK = 256
_SMALLEST = 1e-38
_STEPS = 65535  # of the table that quantize_blockwise looks numbers from -1 to 1 up in


@dataclass(frozen=True, slots=True)
class FourBitEncoder(RowEncoder):
    """Indices of the nearest values, two in a byte, after dividing each block by its largest magnitude."""

    format: BitsAndBytes4Bit

    def rows_together(self, columns: int) -> int:
        return self.format.block_size // math.gcd(columns, self.format.block_size)

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None, shared: Mapping) -> Tensors:
        values = rows.reshape(-1).float()
        whole = values.numel() // self.format.block_size * self.format.block_size
        blocks, rest = values[:whole].view(-1, self.format.block_size), values[whole:]
        largest = blocks.abs().amax(1)
        scaled = (blocks * largest.clamp(min=_SMALLEST).reciprocal_()[:, None]).view(-1)
        if rest.numel():
            last = rest.abs().amax().clamp_(min=_SMALLEST)
            largest = torch.cat([largest, last.view(1)])
            scaled = torch.cat([scaled, rest / last])
        index = self.nearest(torch.nn.functional.pad(scaled, (0, scaled.numel() % 2)))
        return {DATA: index[::2] << 4 | index[1::2], "absmax": largest}

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """uint8: the index of the value next to each number from -1 to 1."""
        middles, order = _middles(self.format.quant_type, scaled.device)
        index = torch.bucketize(scaled, middles, out_int32=True)
        return (index if order is None else order[index]).to(torch.uint8)

    def finish(self, joined: Tensors) -> Tensors:
        joined["data"] = joined["data"].view(-1, 1)
        joined["quant_map"] = value_map(self.format.quant_type, joined["data"].device).clone()
        return joined | nest(joined["absmax"], self.format.nested) if self.format.nested else joined


# What a block's largest magnitude is multiplied with to find a better scale.
_CANDIDATES = tuple(1 + 0.05 * step for step in range(-4, 2))
_TABLE_STEPS = 4096


@dataclass(frozen=True, slots=True)
class SearchedFourBitEncoder(FourBitEncoder):
    """The same format with scales that make the (weighted) square error small, which the library does not look for.

    For each candidate the best scale for the indices that it leads to, by least squares; then the indices for the best
    scale of all.
    """

    def encode(self, rows: torch.Tensor, importance: torch.Tensor | None, shared: Mapping) -> Tensors:
        size = self.format.block_size
        count = rows.numel()
        padding = (0, -count % size)
        blocks = torch.nn.functional.pad(rows.reshape(-1).float(), padding).view(-1, size)
        weights = torch.ones((), device=rows.device)
        if importance is not None:
            spread = importance.expand(rows.shape).reshape(-1)
            weights = torch.nn.functional.pad(spread, padding).view(-1, size)
        largest = blocks.abs().amax(1, keepdim=True)
        scale, least = largest, torch.full_like(largest, math.inf)
        for factor in _CANDIDATES:
            values = self._values(blocks, largest * factor)
            weighted = weights * values
            fitted = (weighted * blocks).sum(1, keepdim=True) / (weighted * values).sum(1, keepdim=True)
            error = (weights * (blocks - fitted * values).square_()).sum(1, keepdim=True)
            better = error < least  # never in a block of zeros, where nothing has a number
            least, scale = torch.where(better, error, least), torch.where(better, fitted, scale)
        index = self.nearest(self._scaled(blocks, scale).view(-1)[: count + count % 2])
        return {DATA: index[::2] << 4 | index[1::2], "absmax": scale.view(-1)}

    def _values(self, blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The values next to the blocks, by a table that is fine enough to compare scales by."""
        table = _value_table(self.format.quant_type, blocks.device)
        steps = self._scaled(blocks, scale).add_(1).mul_(_TABLE_STEPS / 2).nan_to_num_(0.0).int()
        return table.index_select(0, steps.view(-1)).view(blocks.shape)

    @staticmethod
    def _scaled(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (blocks / scale.clamp(min=_SMALLEST)).clamp_(-1, 1)


@cache
def value_map(quant_type: str, device: torch.device) -> torch.Tensor:
    """float32 [16]: the number that each index stands for."""
    return torch.tensor(VALUES[quant_type], dtype=torch.float32, device=device)


@cache
def _value_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """float32: for every step from -1 to 1 the value next to it."""
    values, (middles, order) = value_map(quant_type, device), _middles(quant_type, device)
    steps = (
        torch.arange(_TABLE_STEPS + 1, dtype=torch.float32, device=device).mul_(2).div_(_TABLE_STEPS).sub_(1)
    )
    index = torch.bucketize(steps, middles)
    return values[index if order is None else order[index]]


@cache
def _middles(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The middles between neighbouring values, and the indices in the order of their values where that is another."""
    values = value_map(quant_type, device)
    order = values.argsort()
    middles = (values[order[:-1]] + values[order[1:]]) / 2
    return middles, None if quant_type == "nf4" else order


def nest(absmax: torch.Tensor, block: int) -> Tensors:
    """Double quantization: the largest magnitudes less their mean, as 8-bit indices of blocks of their own."""
    offset = absmax.mean()
    values = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % block)).view(-1, block)
    largest = values.abs().amax(1, keepdim=True)
    scaled = (values * largest.clamp(min=_SMALLEST).reciprocal_()).nan_to_num_(0.0).clamp_(-1, 1)
    steps = (scaled + 1).mul_(0.5).mul_(_STEPS).add_(0.5).int()
    index = _dynamic_indices(absmax.device).index_select(0, steps.view(-1)).view(values.shape)
    index.masked_fill_(largest == 0, 0)
    return {
        "absmax": index.view(-1)[: absmax.numel()],
        "nested_absmax": largest.view(-1),
        "nested_quant_map": dynamic_map(absmax.device).clone(),
        "nested_offset": offset.view(1),
    }


@cache
def _dynamic_indices(device: torch.device) -> torch.Tensor:
    """uint8: for every step from -1 to 1 the index of the number next to it; the library rounds to steps first."""
    code = dynamic_map(device)
    steps = torch.arange(_STEPS + 1, dtype=torch.float32, device=device).mul_(2).div_(_STEPS).sub_(1)
    return torch.bucketize(steps, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """float32 [256], ascending: functional.create_dynamic_map(), whose numbers get denser towards zero."""
    numbers = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (bounds[:-1] + bounds[1:]) / 2
        numbers += (10 ** (exponent - 6) * means).tolist()
        numbers += (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)
