"""Linear layers multiplied in 8 bits: both factors rounded, products summed exactly, scaled afterwards.

torch._int_mm and torch._scaled_mm do it where hardware can. Elsewhere a float32 matmul gives the same sums: of int8
exactly, by summing no more products at a time than float32 can hold.
"""

from __future__ import annotations

import torch

from ..core.device import multiplies_float8, multiplies_int8
from ..core.packed import PackedTensor
from ..formats import Scratch
from ..formats.eight_bit_products import EightBitProducts
from ..formats.float8 import to_float32
from ..formats.outlier_products import OutlierProducts
from .outliers import Outliers
from .rounding import rounded_tokens

# Below this many rows (tokens of all images of a batch) reading the weight is all that takes time, and torch._int_mm
# wants more than 16 on a GPU. Modulation and the like have one row an image, and suffer most from rounding.
FEWEST_ROWS = 32
# Products of int8 that float32 sums exactly: 1024 * 127 * 128 < 2 ** 24.
_EXACT_SUM = 1024
# Weights that are converted at a time on a CPU, 8 MiB of float32.
_TILE = 1 << 21
# Results calculated at a time: 64 MiB of sums, and as much again of float32.
_RESULTS = 1 << 24
# Formats whose layers round their input as well.
PRODUCTS = (EightBitProducts, OutlierProducts)
# What torch has for it, under names of its own.
_int_mm, _scaled_mm = torch.ops.aten._int_mm.default, torch.ops.aten._scaled_mm.default


def rounds_input(weight: PackedTensor, x: torch.Tensor) -> bool:
    """Whether a layer with this weight is to be multiplied in 8 bits for input x [..., in]."""
    return isinstance(weight.format, PRODUCTS) and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0


def eight_bit_linear(
    x: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None, width: int = 1
) -> torch.Tensor:
    """x [..., in] times a weight [out, in] that `rounds_input`, plus bias [out]; result [..., out] in x's dtype.

    width: of the groups of channels that are rotated in x before it is rounded, as they were in the weight; 1 for none.
    On one device; not differentiable. The formula is that of the weight's format. Everything but the matmul is
    calculated in float32 and the result is rounded once; columns with outliers are multiplied in x's dtype.
    """
    inputs = x.reshape(-1, x.shape[-1])
    outliers = Outliers(inputs, weight) if isinstance(weight.format, OutlierProducts) else None
    out_features = weight.shape[0]
    output = x.new_empty(len(inputs), out_features)
    step = max(FEWEST_ROWS, _RESULTS // max(1, out_features))
    for rows, results in zip(inputs.split(step), output.split(step), strict=True):
        codes, by_row = _rounded_input(rows, weight, width) if outliers is None else outliers.rounded(rows)
        sums = codes_product(codes, weight.data.view(weight.shape))
        values = sums * weight.parts["scale"].view(-1)
        values.mul_(weight.parts["step"] if by_row is None else by_row)
        if "offset" in weight.parts:
            values.add_(weight.parts["offset"])
        if outliers is not None:
            values.add_(outliers.product(rows))
        if bias is not None:
            values.add_(bias)
        results.copy_(values)
    return output.view(*x.shape[:-1], out_features)


def _rounded_input(
    rows: torch.Tensor, weight: PackedTensor, width: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes of rows [m, in], their scales float32 [m, 1]; None where all have one that is known)."""
    fmt = weight.format
    assert isinstance(fmt, EightBitProducts)
    if fmt.activations == "dynamic":
        return rounded_tokens(rows, fmt.stored, width)
    values = rows.to(torch.float32, copy=True)
    if "factor" in weight.parts:
        values.mul_(weight.parts["factor"])
    if "shift" in weight.parts:
        return fmt.rounded(values.add_(weight.parts["shift"])), None
    if "step" in weight.parts:
        return fmt.rounded(values.div_(weight.parts["step"])), None
    return rounded_tokens(values, fmt.stored)


def codes_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [m, k] @ b [n, k].T of codes: exact int32 for int8, float32 for float8_e4m3fn; contiguous, on one device."""
    if a.dtype != torch.int8:
        if multiplies_float8(a.device) and _is_aligned(b, 16):
            one = torch.ones((), device=a.device)
            return _scaled_mm(a, b.t(), one, one, out_dtype=torch.float32)
        return _float_product(a, b)
    on_cpu = a.device.type == "cpu"
    if multiplies_int8(a.device) and (on_cpu or (len(a) > 16 and _is_aligned(b, 8))):
        return _int_mm(a, b.t())
    return _exact_product(a, b)


def _is_aligned(b: torch.Tensor, multiple: int) -> bool:
    """Whether both sides are whole multiples, as the libraries for GPUs want them."""
    return not (b.shape[0] % multiple or b.shape[1] % multiple)


def _exact_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same as torch._int_mm by float32 matmuls, wherever there are such."""
    sums = torch.zeros((len(a), len(b)), dtype=torch.int32, device=a.device)
    for part, other in zip(a.split(_EXACT_SUM, 1), b.split(_EXACT_SUM, 1), strict=True):
        sums += (part.to(torch.float32) @ other.to(torch.float32).t()).to(torch.int32)
    return sums


def _float_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float8 as float32, as many rows of b at a time as stay in the cache."""
    sums = torch.empty((len(a), len(b)), device=a.device)
    step = max(1, _TILE // b.shape[1]) if b.device.type == "cpu" else len(b)
    scratch = Scratch(b.device, 6 * min(step, len(b)) * b.shape[1])
    values = a.to(torch.float32)
    for start in range(0, len(b), step):
        part = b[start : start + step]
        floats = scratch.get("floats", tuple(part.shape), torch.float32)
        to_float32(part, floats, scratch)
        torch.mm(values, floats.t(), out=sums[:, start : start + step])
    return sums
