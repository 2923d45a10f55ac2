"""LoRA and other weight patches on a packed weight, applied each time the weight is decoded.

A patched weight is never quantized again: at 4 bits the rounding would be larger than the patch. The patch is
added in float32, before the one rounding to the compute dtype; on a bfloat16 grid a weak LoRA would vanish.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import WeightAdapterBase


class WeightPatches:
    """The patches that ComfyUI holds for one key, as a function on the decoded weight."""

    def __init__(self, key: str, patches: list[Any], original_weights: dict[str, Any] | None = None) -> None:
        self.key = key
        self.patches = patches
        self.original_weights = original_weights

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: float32, changed in place where possible. Returns the patched weight, maybe of another shape."""
        return comfy.lora.calculate_weight(
            self.patches,
            weight,
            self.key,
            intermediate_dtype=weight.dtype,
            original_weights=self.original_weights,
        )

    def to(self, device: torch.device) -> tuple[WeightPatches, int]:
        """A copy with its low-rank factors on `device`, and the bytes that this took there.

        Patches as large as the weight itself (full differences, merged models) stay where they are and are
        copied when they are used: keeping them on the device would take the memory that packing saved.
        """
        nbytes = 0
        patches = []
        for patch in self.patches:
            strength, value, *rest = patch
            if isinstance(value, WeightAdapterBase):
                weights = []
                for item in value.weights:
                    if isinstance(item, torch.Tensor) and item.device != device:
                        nbytes += item.nbytes
                        item = item.to(device, non_blocking=True)
                    weights.append(item)
                value = type(value)(value.loaded_keys, tuple(weights))  # type: ignore[call-arg]
            patches.append((strength, value, *rest))
        return WeightPatches(self.key, patches, self.original_weights), nbytes
