"""Random conditioning in place of a text encoder."""

from __future__ import annotations

from typing import Any

import torch


class SnugTestConditioning:
    """Normal random embedding [1, tokens, dim] and, for pooled_dim above 0, pooled output [1, pooled_dim].

    attention_mask adds the mask [1, tokens] of a prompt without padding, which LTX-Video insists on.
    """

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "create"
    CATEGORY = "snug/tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "tokens": ("INT", {"default": 77, "min": 1, "max": 4096}),
                "dim": ("INT", {"default": 768, "min": 1, "max": 65536}),
                "pooled_dim": ("INT", {"default": 0, "min": 0, "max": 65536}),
            },
            "optional": {"attention_mask": ("BOOLEAN", {"default": False})},
        }

    def create(
        self, seed: int, tokens: int, dim: int, pooled_dim: int, attention_mask: bool = False
    ) -> tuple[list[Any]]:
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(1, tokens, dim, generator=generator)
        extras: dict[str, torch.Tensor] = {}
        if pooled_dim:
            extras["pooled_output"] = torch.randn(1, pooled_dim, generator=generator)
        if attention_mask:
            extras["attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
        return ([[embedding, extras]],)
