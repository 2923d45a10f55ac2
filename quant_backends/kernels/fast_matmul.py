"""A linear layer over a weight in any format, multiplied in 8 bits: y = x @ W.T with rows of both rounded.

    W ~ codes * scale     int8 or float8_e4m3fn, a scale for each row (output channel)
    x ~ codes * scale     a scale for each row (token), chosen in the call

For int8 groups of input channels are rotated first, in W and in x alike (`formats.rotation`, which is its own
inverse): outlier channels are spread over their group, without which one of them takes the digits of all others
(QuaRot, Ashkboos et al., 2024; ConvRot in comfy-kitchen). float8 has the range by itself and needs no rotation.

The rounded copy of a weight is made from whatever the weight is packed in; the packed weight is not changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.packed import PackedTensor
from ..formats.eight_bit_products import EightBitProducts
from ..formats.rotated_rows import RotatedRows
from ..formats.scaled_elements import ScaledElements
from .dequantize import dequantize_packed
from .device_products import device_product
from .dispatch import rounds_by_kernel
from .eight_bit import FEWEST_ROWS, eight_bit_linear
from .rounding import rotate_rows, rotation_matrix, rounded_weight

INT8, FLOAT8 = "int8", "float8_e4m3fn"
# Channels that are rotated together: the widest of these powers of 4 that divides the columns.
WIDTHS = (256, 64, 16, 4)
# Operations that take as long as moving one byte: of GPUs as in `low_rank`, of CPUs by benchmarks/fast_matmul.py, where
# rounding a weight in each call is a loss with 256 tokens.
_GPU_FLOP_PER_BYTE, _CPU_FLOP_PER_BYTE = 160, 16
# Bytes moved for each weight to decode it once more than the exact way does, rotate and round it. By one kernel it is
# what could be moved in the time of its 40 to 54 instructions, less what the exact way's decoding moves: 4 to 6 where
# memory is fastest (compute capability 9.0, Triton 3.9; benchmarks/kernel_code.py), fewer elsewhere.
_ROUNDING_BYTES, _ONE_PASS_BYTES = 24, 6
# The part of a matmul's time that 8 bits save.
_SAVED = 0.5


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """codes: int8 or float8_e4m3fn [out, in]; scale: of each row, float32 [out]; width: of the groups of columns that
    are rotated, 1 for none.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    width: int

    @property
    def stored(self) -> str:
        return INT8 if self.codes.dtype == torch.int8 else FLOAT8

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


def rotation_width(stored: str, columns: int) -> int:
    """Of the groups of `columns` that are rotated; 1 where nothing is."""
    return 1 if stored != INT8 else next((width for width in WIDTHS if columns % width == 0), 1)


def round_weight(weight: PackedTensor, stored: str, dtype: torch.dtype) -> RoundedWeight:
    """The weight [out, in] of any format in 8 bits, on its device; stored: INT8 or FLOAT8.

    dtype: what it is decoded to on the way on a GPU without a kernel for it; all others calculate in float32.
    """
    width = rotation_width(stored, weight.shape[1])
    return RoundedWeight(*rounded_weight(weight, stored, width, dtype), width)


def rounded_already(weight: PackedTensor, stored: str) -> RoundedWeight | None:
    """A weight that is stored as these products want it, sharing its bytes; None for all others."""
    fmt, shape = weight.format, tuple(weight.shape)
    if stored == INT8 and isinstance(fmt, RotatedRows):
        width = fmt.group_size
    elif stored == FLOAT8 and fmt in (ScaledElements(FLOAT8, (1, 0)), ScaledElements(FLOAT8, (0, 0))):
        width = 1
    else:
        return None
    scale = weight.parts["scale"].to(torch.float32).reshape(-1).expand(shape[0]).contiguous()
    return RoundedWeight(weight.data.view(shape), scale, width)


def restored(weight: RoundedWeight) -> torch.Tensor:
    """The weight that products are calculated with, in float32 [out, in]: rounded, and rotated back."""
    shape = tuple(weight.codes.shape)
    by_row = ScaledElements(weight.stored, (1, 0))
    dense = dequantize_packed(PackedTensor(weight.codes, by_row, shape, {"scale": weight.scale}))
    if weight.width > 1:
        rotate_rows(dense, weight.width)
    return dense


def rounded_linear(x: torch.Tensor, weight: RoundedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times a rounded weight [out, in], plus bias [out]; result [..., out] in x's dtype.

    On one device; not differentiable. By the device's own kernels where they are found to work, else the same sums by
    `eight_bit_linear`.
    """
    product = device_product(x.device, x.dtype, weight.stored, weight.width)
    if product is not None and not any(size % 16 for size in weight.codes.shape):
        return product(x, weight.codes, weight.scale, bias)
    shape, fmt = tuple(weight.codes.shape), EightBitProducts(weight.stored)
    if weight.stored == INT8:
        packed = PackedTensor(weight.codes, fmt, shape, {"scale": weight.scale})
        return eight_bit_linear(x, packed, bias, weight.width)
    one = torch.ones(1, device=x.device)  # that format has one scale for all rows
    sums = eight_bit_linear(x.to(torch.float32), PackedTensor(weight.codes, fmt, shape, {"scale": one}))
    sums.mul_(weight.scale)
    return (sums if bias is None else sums.add_(bias)).to(x.dtype)


def prepare(device: torch.device, dtype: torch.dtype, stored: str) -> None:
    """Finds the device's kernels and puts the matrices there, so that no call has to.

    Memory that is allocated in a call and kept afterwards breaks CUDA graphs.
    """
    for width in WIDTHS if stored == INT8 else (1,):
        if width > 1 and device.type != "cpu":
            rotation_matrix(width, device, dtype)
        device_product(device, dtype, stored, width)


def rounds_in_one_pass(weight: PackedTensor, device: torch.device) -> bool:
    """Whether a weight like this one is rounded by one kernel on `device`."""
    return device.type != "cpu" and rounds_by_kernel(weight, device)


def fewest_tokens(device: torch.device, is_kept: bool, in_one_pass: bool) -> int:
    """From how many rows of x on the product is worth it; an estimate.

    is_kept: the rounded weight is there, and need not be made for this call. in_one_pass: as `rounds_in_one_pass` says.
    """
    if is_kept:
        return FEWEST_ROWS
    flop = _CPU_FLOP_PER_BYTE if device.type == "cpu" else _GPU_FLOP_PER_BYTE
    nbytes = _ONE_PASS_BYTES if in_one_pass else _ROUNDING_BYTES
    return math.ceil(nbytes * flop / (2 * _SAVED))
