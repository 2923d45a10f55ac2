"""Steps that the encoders share; each equals the numpy of the gguf package, special values included."""

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


def round_half_away(values: torch.Tensor) -> torch.Tensor:
    """C's roundf, to int32."""
    magnitude = values.abs()
    whole = magnitude.floor()
    return to_integers(values.sign() * (whole + (2 * (magnitude - whole)).floor()))


def by_largest(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [n, 1] that maps the number of largest magnitude to code 0, and the codes 0..levels-1 (int32)."""
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    scale = divide(largest, -levels / 2)
    codes = to_integers(values * inverse(scale) + (levels / 2 + 0.5))
    return scale, (codes & 255).clamp_(max=levels - 1)


def by_range(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and minimum [n, 1] that spread the codes over the range of values, and the codes (int32)."""
    minimum = values.amin(1, keepdim=True)
    scale = divide(values.amax(1, keepdim=True) - minimum, levels - 1)
    codes = to_integers((values - minimum) * inverse(scale) + 0.5)
    return scale, minimum, (codes & 255).clamp_(max=levels - 1)


def by_magnitude(values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [n, 1] that maps the largest magnitude to `top`, and the codes -top..top (int32)."""
    scale = values.abs().amax(1, keepdim=True)
    if top != 1:
        scale = divide(scale, top)
    return scale, round_half_away(values * inverse(scale))


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """int32 [n, 32] -> uint8 [n, 16]: code j in the low, code j+16 in the high nibble of byte j."""
    low, high = codes.to(torch.uint8).bitwise_and_(15).view(-1, 2, 16).unbind(1)
    return low | (high << 4)


def pack_fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """int32 [n, 32] -> uint8 [n, 4]: bit j is bit 4 of code j."""
    weights = 1 << torch.arange(8, device=codes.device)
    return ((codes >> 4).view(-1, 4, 8) * weights).sum(2).to(torch.uint8)
