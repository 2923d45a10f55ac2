"""LoRA and other weight patches on a packed weight, applied each time the weight is decoded.

A patched weight is never quantized again: at 4 bits the rounding would be larger than the patch. The patch is
added in float32, before the one rounding to the compute dtype; on a bfloat16 grid a weak LoRA would vanish.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import WeightAdapterBase

from .lora_kinds import is_costly
from .side_branch import SideBranch


class WeightPatches:
    """The patches that ComfyUI holds for one key, as a function on the decoded weight.

    state: what they were made for, to know when they are out of date; `device`: where the low-rank factors are, None
    for where ComfyUI keeps them; `branch`: all of the patches as two factors, where that is wanted and possible;
    `kept`: the patched weight, decoded, where there was memory for it; `nbytes`: what all this takes on the device
    beyond what ComfyUI has.
    """

    kept: torch.Tensor | None = None

    def __init__(
        self,
        key: str,
        patches: list[Any],
        device: torch.device | None = None,
        branch: SideBranch | None = None,
        state: Any = None,
        original_weights: dict[str, Any] | None = None,
    ) -> None:
        self.key = key
        self.device = device
        self.branch = branch
        self.state = state
        self.original_weights = original_weights
        self.costly = any(is_costly(patch) for patch in patches)
        self._moved_bytes = 0
        self.patches = patches
        if device is not None and branch is None:
            self.patches = [self._moved(patch, device) for patch in patches]

    @property
    def nbytes(self) -> int:
        branch = 0 if self.branch is None or self.device is None else self.branch.nbytes
        return self._moved_bytes + branch + (0 if self.kept is None else self.kept.nbytes)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: float32, changed in place where possible. Returns the patched weight, maybe of another shape."""
        if self.branch is not None:
            return self.branch.merge_into(weight)
        return comfy.lora.calculate_weight(
            self.patches,
            weight,
            self.key,
            intermediate_dtype=weight.dtype,
            original_weights=self.original_weights,
        )

    def _moved(self, patch: Any, device: torch.device) -> Any:
        """The patch with an adapter's tensors on `device`.

        Patches as large as the weight (full differences, merged models) stay where they are and are copied
        when they are used: keeping them on the device would take the memory that packing saved.
        """
        strength, value, *rest = patch
        if not isinstance(value, WeightAdapterBase):
            return patch
        weights = []
        for item in value.weights:
            if isinstance(item, torch.Tensor) and item.device != device:
                self._moved_bytes += item.nbytes
                item = item.to(device, non_blocking=True)
            weights.append(item)
        return (strength, type(value)(value.loaded_keys, tuple(weights)), *rest)  # type: ignore[call-arg]


def adapter_bytes(patches: list[Any]) -> int:
    """Bytes of the adapters' tensors in a list of patches: what moving them to a device can take."""
    return sum(
        item.nbytes
        for patch in patches
        if isinstance(patch[1], WeightAdapterBase)
        for item in patch[1].weights
        if isinstance(item, torch.Tensor)
    )


def needs_original(patches: list[Any]) -> bool:
    """Whether a patch is a difference to the original weight that is only taken when it is applied."""
    return any(isinstance(patch[1], tuple) and patch[1][0] == "model_as_lora" for patch in patches)
