"""The layers of a network as quantization sees them: a name, a shape, a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

# Where the weights of experts lie in a mixture.
EXPERTS = ".experts."


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer with a weight.

    name: in the network itself, without ComfyUI's prefix and without ".weight". shape: of the weight, in torch order.
    dtype: what its weight is stored in now. kind: "experts" are linear layers of one shape in one weight
    [experts, out, in].
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["linear", "conv", "embedding", "experts"] = "linear"
    dtype: torch.dtype = torch.bfloat16

    @property
    def weights(self) -> int:
        return torch.Size(self.shape).numel()
