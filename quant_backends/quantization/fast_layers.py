"""Which linear layers of a diffusion model gain from products in 8 bits.

Rounding the input hurts most, and saves least, where a layer sees few rows: modulation has one an image, and the text
beside an image a few hundred at most. Embedders and the last layer are no part of the blocks, and delicate.
"""

from __future__ import annotations

import re

# By the names that the model families give them: reason for the report, and names inside a block.
_LEFT_OUT = {
    "modulation": re.compile(
        r"(^|[._])(mod|modulation|ada_?ln\w*|emb_layers|time_mod\w*)(\.|_|$)", re.IGNORECASE
    ),
    "text": re.compile(
        r"(^|\.)(txt|text|context|caption|cap)_|(^|\.)(ff_context|token_refiner)\b"
        r"|(^|\.)(add_[qkv]_proj|to_add_out|[kv]_img)$|(^|\.)(attn2\.to|cross_attn\.)_?[kv]$"
    ),
}


def reason_to_leave_out(name: str) -> str | None:
    """Why a layer of a block is not worth it, by its name in the network; None: it is."""
    return next((reason for reason, pattern in _LEFT_OUT.items() if pattern.search(name)), None)
