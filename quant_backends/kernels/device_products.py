"""8-bit products by the kernels that a device has: comfy-kitchen's for int8, torch's own for float8.

Neither is asked for its version. What is there is tried once on a small product and used if the result is right.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache

import torch

from ..core.device import multiplies_float8, on_device
from ..formats.rotation import rotate
from ..formats.scaled_elements import ScaledElements
from .dequantize import dequantize_packed, quantize_packed
from .dispatch import TORCH, using
from .rounding import rounded_tokens

logger = logging.getLogger("snug")

# (x [..., in], codes [out, in], scale of each row, float32 [out], bias [out] or None) -> [..., out] in x's dtype
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

# Of the product that a kernel is tried with: rows, columns and outputs.
_TRIAL = (64, 512, 128)
# Two ways of rounding the same rows differ by a part of the rounding's own error, 1% for int8 and 4% for float8.
_TOLERANCE = {"int8": 0.02, "float8_e4m3fn": 0.06}


@lru_cache
def device_product(device: torch.device, dtype: torch.dtype, stored: str, width: int) -> Product | None:
    """The product for x of `dtype` whose columns are rotated in groups of `width` (1: not); None without a kernel.

    The kernel rotates x itself. Shapes must be multiples of 16. Asking for the first time waits for the device.
    """
    if device.type != "cuda":
        return None
    product = _kitchen_int8(width) if stored == "int8" else _scaled_rows(device)
    if product is None:
        return None
    problem = _problem(product, device, dtype, stored, width)
    if problem is not None:
        logger.info("%s products on %s are calculated by torch: %s", stored, device, problem)
        return None
    return product


def _problem(
    product: Product, device: torch.device, dtype: torch.dtype, stored: str, width: int
) -> str | None:
    """Why the product is not usable there, None when it is. It is compared with float64."""
    rows, columns, outputs = _TRIAL
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, columns, generator=generator) for count in (rows, outputs))
    bias = torch.randn(outputs, generator=generator)
    rotated = x if width == 1 else rotate(x.clone(), width, torch.empty_like(x))
    by_row = ScaledElements(stored, (1, 0))
    with using(TORCH):  # on the CPU, where tests that ask for a GPU's kernels would find none
        packed = quantize_packed(weight, by_row)  # its columns stand for rotated ones
        inputs = dequantize_packed(quantize_packed(rotated, by_row)).double()
        wanted = inputs @ dequantize_packed(packed).double().t() + bias.double()
    codes, scale = packed.data.to(device), packed.parts["scale"].view(-1).to(device)
    try:
        found = product(x.to(device, dtype), codes, scale, bias.to(device, dtype))
    except Exception as error:  # whatever a library raises where it does not support a device
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if found.dtype != dtype or found.shape != wanted.shape:
        return f"a result of {found.dtype} {tuple(found.shape)}"
    error = ((found.double().cpu() - wanted).norm() / wanted.norm()).item()
    return None if error < _TOLERANCE[stored] else f"an error of {error:.1%}"


def _kitchen_int8(width: int) -> Product | None:
    """comfy-kitchen's int8_linear, where it has anything but its plain torch code for it."""
    try:
        import comfy_kitchen

        int8_linear = comfy_kitchen.int8_linear
        backends = comfy_kitchen.list_backends()
        known = inspect.signature(int8_linear).parameters
    except (ImportError, AttributeError):
        return None
    if not {"convrot", "convrot_groupsize", "out_dtype"} <= set(known):
        return None
    is_there = any(
        found["available"] and not found["disabled"] and "int8_linear" in found["capabilities"]
        for name, found in backends.items()
        if name != "eager"
    )
    if not is_there:
        return None
    rotation = {"convrot": width > 1, "convrot_groupsize": max(width, 4)}

    def product(
        x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        with on_device(x.device):  # its kernels are started on the current one
            return int8_linear(x, codes, scale.view(-1, 1), bias, out_dtype=x.dtype, **rotation)

    return product


def _scaled_rows(device: torch.device) -> Product | None:
    """torch._scaled_mm with a scale for each row of both factors."""
    if not multiplies_float8(device):
        return None

    def product(
        x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rounded, by_row = rounded_tokens(rows, "float8_e4m3fn")
        result = torch.ops.aten._scaled_mm.default(
            rounded,
            codes.t(),
            scale_a=by_row,
            scale_b=scale.view(1, -1),
            bias=bias,
            out_dtype=x.dtype,
        )
        return result.view(*x.shape[:-1], len(codes))

    return product
