"""Input columns with outliers, multiplied in the input's own precision beside a product in 8 bits (LLM.int8).

bitsandbytes reads back which columns these are, for which a GPU has to wait. Here as many columns are taken for every
input, those with the largest numbers, and those of them that have no outlier count as zero.
"""

from __future__ import annotations

import torch

from ..core.packed import PackedTensor
from ..formats import Scratch
from ..formats.outlier_products import WEIGHT, OutlierProducts
from ..formats.scaled_elements import ONE_127TH

# The part of a layer's input columns that may be taken, and how many at least. The paper finds one in a thousand; where
# there are more, the smallest of them are rounded with the rest.
PART, FEWEST = 16, 64
_TINY = torch.finfo(torch.float32).tiny


class Outliers:
    """Of one call of a layer: inputs [m, in] and a weight in OutlierProducts [out, in], on one device."""

    def __init__(self, inputs: torch.Tensor, weight: PackedTensor) -> None:
        fmt, (rows, columns) = weight.format, weight.shape
        assert isinstance(fmt, OutlierProducts)
        self._threshold = fmt.threshold or float("inf")
        largest = torch.maximum(inputs.amax(0), -inputs.amin(0))
        found, self._columns = largest.topk(min(columns, max(FEWEST, columns // PART)))
        self._chosen = found >= self._threshold
        self._mask = torch.zeros(columns, dtype=torch.bool, device=inputs.device)
        self._mask.scatter_(0, self._columns, self._chosen)
        shape = (rows, len(self._columns))
        values = torch.empty(shape, dtype=torch.float32, device=inputs.device)
        data = weight.data.view(weight.shape).index_select(1, self._columns)
        WEIGHT.decode_rows(data, weight.parts, shape, 0, rows, values, Scratch(inputs.device, 0))
        self._weight = values.to(inputs.dtype)

    def rounded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(int8 codes of some of the inputs, 0 in the columns; float32 [m, 1] to multiply their products with)."""
        values = rows.to(torch.float32, copy=True)
        values.masked_fill_((values.abs() >= self._threshold) & self._mask, 0)
        largest = torch.maximum(values.amax(1, keepdim=True), values.amin(1, keepdim=True).neg_())
        codes = values.mul_(127.0 / largest.clamp_(min=_TINY * 127)).round_().masked_fill_(self._mask, 0)
        return codes.to(torch.int8), largest.mul_(ONE_127TH**2)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """What the columns add to the layer's output: [m, out] in the inputs' dtype."""
        return (rows.index_select(1, self._columns) * self._chosen) @ self._weight.t()
