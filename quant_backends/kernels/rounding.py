"""Rows rounded to 8 bits with a scale for each, their channels rotated in groups before where that is asked for.

    codes * scale ~ rotate(row)      scale = max |rotate(row)| / largest code

By a kernel where `dispatch` finds one, else with torch: in float32 and by additions on a CPU, elsewhere by a matmul in
the rows' dtype.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..core.packed import PackedTensor
from ..formats.eight_bit_products import LARGEST
from ..formats.rotation import rotate
from ..formats.scaled_base import rows_and_columns
from ..formats.scaled_elements import ScaledElements
from .dequantize import dequantize_packed, quantize_packed, weights_per_chunk
from .dispatch import round_tokens_by_kernel, round_weight_by_kernel

_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def rounded_weight(
    weight: PackedTensor, stored: str, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, `stored` ("int8" or "float8_e4m3fn") [out, in]; scale of each row, float32 [out]) of a weight [out, in].

    width: of the groups that are rotated, 1 for none. dtype: what the weight is decoded to on the way on a GPU without
    a kernel, where float32 would take twice the time; everything else calculates in float32.
    """
    found = round_weight_by_kernel(weight, stored, width)
    if found is not None:
        return found
    dense = dequantize_packed(weight, torch.float32 if weight.data.device.type == "cpu" else dtype)
    if width > 1:
        for rows in _chunks(dense):
            rotate_rows(rows, width)
    packed = quantize_packed(dense, ScaledElements(stored, (1, 0)))
    return packed.data, packed.parts["scale"].view(-1)


def exactly_rounded(weight: PackedTensor, stored: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch in float32 on any device, as the kernel does it: by additions, and by exact quotients.

    On a GPU torch divides by a plain number less exactly. That would move what lies between two codes, where weights
    of few bits often lie.
    """
    dense = dequantize_packed(weight).view(rows_and_columns(weight.shape))
    codes = torch.empty(dense.shape, dtype=getattr(torch, stored), device=dense.device)
    largest, scales = LARGEST[stored], []
    for rows, results in zip(_chunks(dense), _chunks(codes), strict=True):
        if width > 1:
            rotate(rows, width, torch.empty_like(rows))
        magnitude = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
        scale = magnitude.div_(torch.full_like(magnitude, largest)).clamp_(_TINY, _HUGE / largest)
        values = rows.div_(scale)
        results.copy_((values.round_() if stored == "int8" else values).clamp_(-largest, largest))
        scales.append(scale.view(-1))
    return codes, torch.cat(scales)


def rounded_tokens(rows: torch.Tensor, stored: str, width: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [m, k], scale float32 [m, 1]) of rows [m, k] of float numbers, which stay as they are."""
    found = round_tokens_by_kernel(rows, stored, width)
    if found is not None:
        return found[0], found[1].view(-1, 1)
    if width > 1:
        rows = _rotated(rows, width)
    largest = LARGEST[stored]
    magnitude = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_()).float()
    scale = magnitude.div_(largest).clamp_(min=_TINY)
    values = rows / scale
    if stored == "int8":
        values.round_()
    return values.clamp_(-largest, largest).to(getattr(torch, stored)), scale


def rotate_rows(rows: torch.Tensor, width: int) -> None:
    """Rotates rows [m, k], contiguous, in place: in float32 on a CPU, by one matmul in their dtype elsewhere."""
    if rows.device.type == "cpu":
        rotate(rows, width, torch.empty_like(rows))
    else:
        groups = rows.view(-1, width)
        groups.copy_(groups @ rotation_matrix(width, rows.device, rows.dtype))


@lru_cache
def rotation_matrix(width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Its elements are powers of 2, exact in every dtype. Kept, so that no call has to bring it to the device."""
    matrix = torch.eye(width)
    return rotate(matrix, width, torch.empty_like(matrix)).to(device, dtype)


def _rotated(rows: torch.Tensor, width: int) -> torch.Tensor:
    if rows.device.type == "cpu":
        values = rows.to(torch.float32, copy=True).contiguous()
        return rotate(values, width, torch.empty_like(values))
    groups = rows.reshape(-1, width)
    return (groups @ rotation_matrix(width, rows.device, rows.dtype)).view(rows.shape)


def _chunks(dense: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return dense.split(max(1, weights_per_chunk(dense.device) // max(1, dense.shape[1])))
