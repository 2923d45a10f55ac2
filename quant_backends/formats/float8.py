"""float8 numbers to float32. On a CPU torch converts them one by one; through float16 it takes an eighth of the time.

e5m2 is the upper half of float16. e4m3fn has the same order of bits with one exponent bit less, so that its seven
bits, moved to bit 7 of a float16, stand for 2^-8 of the number, subnormal or not; only its NaN (all ones) does not.
"""

from __future__ import annotations

import torch

from .base import Scratch
from .words import number

# What is left of a sign-extended byte after the shift: sign, four bits of exponent, three of mantissa.
_E4M3_BITS = 0b1011_1111_1000_0000 - (1 << 16)


def to_float32(data: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """out = data, exactly; both contiguous, of one shape; out: float32, or for integers any type that holds them."""
    if data.device.type != "cpu" or data.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        out.copy_(data)
        return
    halves = scratch.get("halves", tuple(data.shape), torch.int16).copy_(data.view(torch.int8))
    if data.dtype == torch.float8_e5m2:
        out.copy_(halves.bitwise_left_shift_(number(8)).view(torch.float16))
    elif _has_nan(data):
        out.copy_(data)
    else:
        halves.bitwise_left_shift_(number(7)).bitwise_and_(number(_E4M3_BITS))
        out.copy_(halves.view(torch.float16)).mul_(number(256.0))


def _has_nan(data: torch.Tensor) -> bool:
    """Whether a byte of the e4m3fn numbers is 0x7F or 0xFF: the largest one, signed or unsigned."""
    return bool(data.view(torch.int8).max() == 0x7F or data.view(torch.uint8).max() == 0xFF)
