"""ggml's K-quants: super-blocks of 256 weights whose sub-blocks have small integer scales.

Layouts: `block_q2_K` … `block_q6_K` in ggml-common.h; the order of operations follows the gguf package, to
which results are equal bit for bit.
"""

from __future__ import annotations

import torch

from .base import Format, Scratch


def _scales_and_minima(packed: torch.Tensor) -> torch.Tensor:
    """Unpack the 6-bit scales and minima of Q4_K and Q5_K: uint8 [n, 12] -> uint8 [n, 2, 8], scales first.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minima 0-3 in their low 6 bits, with the top 2 bits of scales and
    minima 4-7 above; bytes 8-11 hold the low nibbles of scales (low) and minima (high) 4-7.
    """
    first = packed[:, :8].view(-1, 2, 4)
    last = packed[:, None, 8:]
    low = torch.cat([last & 15, last >> 4], dim=1)
    return torch.cat([first & 63, low | ((first >> 2) & 48)], dim=2)


class Q4_K(Format):
    """d f16 | dmin f16 | scales 12 bytes | qs 128 bytes.

    Eight sub-blocks of 32: bytes 32k..32k+31 hold sub-block 2k in the low and 2k+1 in the high nibbles;
    (d * scale) * q - (dmin * min).
    """

    ggml_type, block_size, block_bytes = 12, 256, 144

    @classmethod
    def decode(cls, blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        n = blocks.shape[0]
        d = blocks[:, :4].view(torch.float16).float()
        scales = _scales_and_minima(blocks[:, 4:16]) * d[:, :, None]
        scale, minimum = scales[:, 0, :, None], scales[:, 1, :, None]
        qs = blocks[:, 16:].unflatten(1, (4, 32))
        q = scratch.get("q", (n, 4, 2, 32), torch.uint8)
        torch.bitwise_and(qs, 15, out=q[:, :, 0])
        torch.bitwise_right_shift(qs, 4, out=q[:, :, 1])
        weights = out.view(n, 8, 32)
        torch.mul(q.view(n, 8, 32), scale, out=weights)
        weights.sub_(minimum)
