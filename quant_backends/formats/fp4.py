"""Four-bit formats whose codes are looked up: IQ4_NL, IQ4_XS, MXFP4 and NVFP4.

Layouts: `block_iq4_nl`, `block_iq4_xs`, `block_mxfp4` and `block_nvfp4` in ggml-common.h; the order of
operations follows the gguf package, to which results are equal bit for bit. The nibbles of two neighbours are
looked up at once.
"""

from __future__ import annotations

import functools

import torch

from .base import Format, Scratch
from .encoding import pack_nibbles, to_integers
from .k_encoding import encode_iq4_nl, encode_iq4_xs
from .tables import nibble_pairs, shifts
from .words import column_words, extract, half_floats, number

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# What the codes of each format stand for, before they are scaled.
LOOKED_UP = {"IQ4_NL": _IQ4, "IQ4_XS": _IQ4, "MXFP4": _E2M1_DOUBLED, "NVFP4": _E2M1_DOUBLED}
_TABLE_UNIT = 4  # the table of codes is for weights divided by this many steps
_TABLE_SHIFT, _TABLE_SIZE = 21, 2048  # sign, exponent and two bits of the mantissa of a float32


def _look_up(
    blocks: torch.Tensor, start: int, run: int, values: tuple[int, ...], out: torch.Tensor, scratch: Scratch
) -> None:
    """out = values[nibble] for the bytes from `start` on: each `run` has its low, then its high nibbles."""
    qs = column_words(blocks, start, blocks.shape[1], scratch, "qs").view(-1, run // 8)
    nibbles = scratch.get("nibbles", (len(qs), 2, run // 8), torch.int64)
    extract(qs, 0, 15, nibbles[:, 0], scratch)
    extract(qs, 4, 15, nibbles[:, 1], scratch)
    pairs = nibbles.view(torch.int16).view(-1)
    index = scratch.get("index", (pairs.numel(),), torch.int32).copy_(pairs)
    torch.index_select(nibble_pairs(values, blocks.device), 0, index, out=out.view(torch.int64).view(-1))


class IQ4_NL(Format):
    """d f16 | qs 16 bytes: weight j in the low, weight j+16 in the high nibble of byte j; d * value[q]."""

    ggml_type, block_size, block_bytes = 20, 32, 18
    searches = True

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        _look_up(blocks, 2, 16, _IQ4, out, scratch)
        out.mul_(half_floats(blocks[:, :2]).t())

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return encode_iq4_nl(values, importance, _IQ4)


class IQ4_XS(Format):
    """d f16 | scales_h u16 | scales_l 4 bytes | qs 128 bytes.

    Eight sub-blocks of 32 weights, each as in IQ4_NL: (d * (scale - 32)) * value[q]. Scale i has its low 4
    bits in nibble i % 2 of scales_l[i // 2] and its high 2 bits in bits 2i, 2i+1 of scales_h.
    """

    ggml_type, block_size, block_bytes = 23, 256, 136
    searches = True

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        n, device = blocks.shape[0], blocks.device
        _look_up(blocks, 8, 16, _IQ4, out, scratch)
        low = blocks[:, 4:8].unsqueeze(2) >> shifts(0, 4, 2, torch.uint8, device)
        high = blocks[:, 2:4].view(torch.int16).int() >> shifts(0, 2, 8, torch.int32, device)
        scales = (low.view(n, 8) & number(15)) + ((high & number(3)) << number(4)) - number(32)
        scale = scales * half_floats(blocks[:, :2]).t()
        out.view(n, 8, 32).mul_(scale.unsqueeze(2))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return encode_iq4_xs(values, importance, _IQ4)


class MXFP4(Format):
    """e u8 | qs 16 bytes as in IQ4_NL; 2^(e - 128) * twice the e2m1 value (OCP microscaling)."""

    ggml_type, block_size, block_bytes = 39, 32, 17

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        _look_up(blocks, 1, 16, _E2M1_DOUBLED, out, scratch)
        out.mul_(_e8m0_halves(blocks.device)[blocks[:, :1].int()])

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        largest = values.abs().amax(1, keepdim=True)
        # float32 would place the step to the next exponent elsewhere than the gguf package; MPS has no float64.
        wide = largest if values.device.type == "mps" else largest.double()
        exponent = to_integers(wide.log2().float().floor() + 125) & 255
        exponent = torch.where(largest > 0, exponent, 0)
        scale = _e8m0_halves(values.device)[exponent]
        # Powers of two, so that the product is exact; by this unit the factor of no exponent in use is subnormal.
        bits = (values * (scale * _TABLE_UNIT).reciprocal()).view(torch.int32)
        index = bits.sub_(1).bitwise_right_shift_(_TABLE_SHIFT).bitwise_and_(_TABLE_SIZE - 1)
        codes = _e2m1_codes(values.device).index_select(0, index.view(-1)).view(values.shape)
        # Beside inf and NaN the scale is far too small for the other weights: their errors differ by rounding alone.
        unusable = ~largest.isfinite()
        if values.device.type != "cpu":  # which blocks are such is not read from a device
            codes = torch.where(unusable, _nearest_e2m1(values, scale).to(codes.dtype), codes)
        elif unusable.any():
            rows = unusable.view(-1).nonzero().view(-1)
            codes[rows] = _nearest_e2m1(values[rows], scale[rows]).to(codes.dtype)
        return torch.cat([exponent.to(torch.uint8), pack_nibbles(codes)], dim=1)


class NVFP4(Format):
    """d 4 x unsigned e4m3 | qs 32 bytes.

    Four sub-blocks of 16 weights: (d / 2) * twice the e2m1 value; sub-block s has weight j in the low and
    weight j+8 in the high nibble of qs[8s + j]. The scale bytes 0 and 127 (NaN) count as zero.
    """

    ggml_type, block_size, block_bytes = 40, 64, 36

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        _look_up(blocks, 4, 8, _E2M1_DOUBLED, out, scratch)
        scale = _ue4m3_halves(blocks.device)[blocks[:, :4].int()]
        out.view(-1, 16).mul_(scale.view(-1, 1))


@functools.cache
def _e8m0_halves(device: torch.device) -> torch.Tensor:
    """float32 [256]: half the e8m0 value 2^(e - 127) of each byte; 2^-128 and 2^-127 are subnormal."""
    exponent = torch.arange(256, dtype=torch.int32)
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.view(torch.float32).to(device)


def _nearest_e2m1(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """uint8 [n, k]: the first code of least error for values [n, k] with scale [n, 1], as the gguf package finds it."""
    candidates = scale * torch.tensor(_E2M1_DOUBLED, dtype=torch.float32, device=values.device)
    return (candidates.unsqueeze(1) - values.unsqueeze(2)).abs_().argmin(2).to(torch.uint8)


@functools.cache
def _e2m1_codes(device: torch.device) -> torch.Tensor:
    """uint8 [_TABLE_SIZE]: the code of a weight divided by `_TABLE_UNIT` steps, by the upper bits of (its bits - 1).

    The middle of two neighbours has no lower bits. The 1 puts it beside smaller magnitudes, whose code comes first,
    and both zeros among the NaN, which get code 0.
    """
    inside = (torch.arange(_TABLE_SIZE) << _TABLE_SHIFT) + (1 << _TABLE_SHIFT - 1)
    values = inside.to(torch.int32).view(torch.float32).nan_to_num(0.0).view(1, -1)
    return _nearest_e2m1(values, torch.full((1, 1), 1 / _TABLE_UNIT)).view(-1).to(device)


@functools.cache
def _ue4m3_halves(device: torch.device) -> torch.Tensor:
    """float32 [256]: half the unsigned e4m3 value of each byte (bias 7; the top bit is ignored)."""
    byte = torch.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7).float()
    normal = torch.ldexp(1 + mantissa / 8, exponent - 8)
    value = torch.where(exponent == 0, mantissa * 2**-10, normal)
    return torch.where((byte == 0) | (byte == 0x7F), 0.0, value).to(device)
