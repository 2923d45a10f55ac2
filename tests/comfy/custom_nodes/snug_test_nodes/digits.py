"""The prompt of the tiny model that draws digits."""

from __future__ import annotations

from typing import Any

import torch

_NOTHING, _TOKENS, _WIDTH = 10, 2, 4096


class SnugTestDigits:
    """Digits such as "0123" to CONDITIONING for a batch of as many pictures, [number of digits, 2, 4096].

    Other characters are left out; without a digit it is the empty prompt, the negative one of guidance.
    """

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "snug/tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"digits": ("STRING", {"default": "0123456789"})}}

    def encode(self, digits: str) -> tuple[list[Any]]:
        seeds = [int(letter) for letter in digits if letter in "0123456789"] or [_NOTHING]
        embeddings = [
            torch.randn(_TOKENS, _WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        return ([[torch.stack(embeddings), {}]],)
