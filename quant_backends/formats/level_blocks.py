"""Blocks of nearly the same number, in formats whose weights are d * scale * level.

Such a block has nothing to gain from levels that differ inside a sub-block. What can be better or worse is how near
the products of a scale and a level come to the means of its sub-blocks, and levels of any size are as good for that:
3 * 31 lies between 4 * 23 and 4 * 24. The search for one scale after the other does not see this.
"""

from __future__ import annotations

from functools import cache

import torch

from .search import LEAST_IMPORTANCE, Symmetric, half

# Of the largest magnitude of a block: the range up to which its numbers count as nearly the same.
_RANGE = 0.1
# Of the largest product: the least one that the mean of a block is tried to become.
_PART = 0.35


def refit_level_blocks(
    found: Symmetric,
    values: torch.Tensor,
    importance: torch.Tensor | None,
    size: int,
    levels: tuple[int, int],
    scale_range: tuple[int, int],
) -> Symmetric:
    """`found` with blocks of nearly the same number replaced where that lowers their error.

    values, importance, size, scale_range: as `fit_symmetric` takes them; levels: least and largest.
    """
    least, most = values.amin(1), values.amax(1)
    level = (least * most > 0) & (most - least <= _RANGE * torch.maximum(most, -least))
    if values.device.type == "cpu":
        rows = level.nonzero().view(-1)
        if not rows.numel():
            return found
    else:  # nothing is read back: all blocks are refitted
        rows = torch.arange(len(values), device=values.device)
    x = values[rows].view(len(rows), -1, size)
    given = torch.ones_like(values) if importance is None else importance
    w = given[rows].clamp(min=LEAST_IMPORTANCE).view(x.shape)
    total, weighted = w.sum(2), (w * x).sum(2)
    mean, whole = weighted / total, weighted.sum(1, keepdim=True) / total.sum(1, keepdim=True)
    products, scales, level_of, large = _products(levels, scale_range, values.device)
    middles = (products[1:] + products[:-1]) / 2
    d, index, error = whole, torch.zeros_like(mean, dtype=torch.int64), torch.full_like(whole, torch.inf)
    for product in large:
        tried = half(whole / product)
        nearest = torch.bucketize(mean / tried, middles)
        lost = ((tried * products[nearest] - mean).square_() * total).sum(1, keepdim=True)
        better = lost < error
        d, error = torch.where(better, tried, d), torch.where(better, lost, error)
        index = torch.where(better, nearest, index)
    new_levels = level_of[index].unsqueeze(2).expand(x.shape)
    refitted = Symmetric(d, scales[index], new_levels.reshape(len(rows), -1))
    before = Symmetric(*(part[rows] for part in found))
    better = (_error(refitted, x, w) < _error(before, x, w)) & level[rows].unsqueeze(1)
    return Symmetric(
        *(
            old.index_copy(0, rows, torch.where(better, new, same))
            for old, new, same in zip(found, refitted, before, strict=True)
        )
    )


def _error(fitted: Symmetric, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The sum of w * (x - decoded)^2 of each block: [n, 1]."""
    decoded = (fitted.d * fitted.scales).unsqueeze(2) * fitted.levels.view(x.shape)
    return ((x - decoded).square_() * w).sum((1, 2)).unsqueeze(1)


@cache
def _products(
    levels: tuple[int, int], scale_range: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, ...]:
    """The products above 0 of a scale and a level, ascending, one scale and level for each: float32 [k] each.

    Besides, those of the products that the mean of a block is tried to become.
    """
    found = {
        scale * level: (scale, level)
        for scale in range(scale_range[0], scale_range[1] + 1)
        for level in range(levels[0], levels[1] + 1)
        if scale * level > 0
    }
    ascending = sorted(found)
    rows = torch.tensor([(product, *found[product]) for product in ascending], dtype=torch.float32)
    large = rows[rows[:, 0] >= _PART * ascending[-1], 0]
    return *rows.to(device).unbind(1), large.to(device)
