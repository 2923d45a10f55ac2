"""Steps that the encoders share; each equals the numpy of the gguf package, special values included.

The operations are the ones that torch vectorises: it finds extremes far faster than their places, and converts to int8
faster than it truncates.
"""

from __future__ import annotations

import torch


def half_bytes(values: torch.Tensor) -> torch.Tensor:
    """float32 [n, k] rounded to float16, as uint8 [n, 2k]."""
    return values.to(torch.float16).view(torch.uint8)


def divide(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """values / divisor, rounded once: by a Python number, CUDA would multiply with the rounded reciprocal."""
    return values / torch.full((), divisor, device=values.device)


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, or 0 where the scale is 0."""
    return torch.where(scale == 0, torch.zeros_like(scale), scale.reciprocal())


def to_integers(values: torch.Tensor) -> torch.Tensor:
    """float32 truncated to int32; NaN and infinity, which only unusable scales yield, become 0."""
    return values.nan_to_num(0.0, 0.0, 0.0).to(torch.int32)


def by_largest(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [n, 1] that maps the number of largest magnitude to code 0, and the codes (uint8)."""
    scale = divide(_largest(values), -levels / 2)
    return scale, _truncated((values * inverse(scale)).add_(levels / 2 + 0.5), levels - 1)


def by_range(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and minimum [n, 1] that spread the codes over the range of values, and the codes (uint8)."""
    minimum = values.amin(1, keepdim=True)
    scale = divide(values.amax(1, keepdim=True) - minimum, levels - 1)
    codes = (values - minimum).mul_(inverse(scale)).add_(0.5)
    return scale, minimum, _truncated(codes, levels - 1)


def by_magnitude(values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [n, 1] that maps the largest magnitude to `top`, and the codes -top..top (int8)."""
    scale = values.abs().amax(1, keepdim=True)
    if top != 1:
        scale = divide(scale, top)
    scaled = (values * inverse(scale)).nan_to_num_(0.0, 0.0, 0.0)
    # C's roundf: halves go away from zero.
    whole = scaled.to(torch.int8)
    return scale, scaled.sub_(whole.float()).mul_(2).to(torch.int8).add_(whole)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Of each row the number of largest magnitude, the first one where there are two: [n, 1]."""
    if values.device.type != "cpu":
        return values.gather(1, values.abs().argmax(1, keepdim=True))
    most, least = values.amax(1, keepdim=True), values.amin(1, keepdim=True)
    largest = torch.where(most >= -least, most, least)
    equal = (most == -least).view(-1).nonzero().view(-1)  # only here their places matter
    if equal.numel():
        some = values[equal]
        largest[equal] = some.gather(1, some.abs().argmax(1, keepdim=True))
    return largest


def _truncated(codes: torch.Tensor, top: int) -> torch.Tensor:
    return codes.nan_to_num_(0.0, 0.0, 0.0).clamp_(max=top).to(torch.int8).view(torch.uint8)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 32] -> uint8 [n, 16]: four bits of code j in the low, of code j+16 in the high nibble of byte j."""
    words = codes.contiguous().view(torch.int64) & _bytes_of(15)
    return (words[:, :2] | words[:, 2:] << 4).view(torch.uint8)


def pack_fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 32] -> uint8 [n, 4]: bit j is bit 4 of code j."""
    bits = (codes.view(torch.int64) >> 4) & _bytes_of(1)
    # The factor moves the bit of byte j to bit 56 + j; no two meet on the way.
    return (bits * 0x0102040810204080 >> 56).to(torch.uint8)


def _bytes_of(byte: int) -> int:
    return int.from_bytes(bytes([byte]) * 8, "little")
