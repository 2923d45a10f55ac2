"""Prompts of the tiny model that draws digits, several at once."""

from __future__ import annotations

import math
from typing import Any

import torch


class SnugTestDigits:
    """Encodes each digit of "0123" as a prompt of its own, as CLIPTextEncode does, to CONDITIONING for a batch of as
    many pictures. Prompts of fewer tokens are repeated to those of the longest, as ComfyUI does where it joins some.
    """

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "snug/tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip": ("CLIP",), "digits": ("STRING", {"default": "0123456789"})}}

    def encode(self, clip: Any, digits: str) -> tuple[list[Any]]:
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(digit))[0][0] for digit in digits]
        tokens = math.lcm(*(each.shape[1] for each in encoded))
        return ([[torch.cat([each.repeat(1, tokens // each.shape[1], 1) for each in encoded]), {}]],)
