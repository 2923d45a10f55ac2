"""Layers that calculate in float32 while the model around them calculates in 16 bits: norms and the final layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...quant_backends.formats.plain import HALVES
from .compiled_layers import Opaque

NORMS = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)
# Classes of models' own, which take one tensor as torch's do.
NORM_NAMES = ("LayerNorm", "GroupNorm", "RMSNorm")
# What the families call the layers behind their last block, directly in the network.
FINAL_LAYERS = (
    "final_layer",
    "final_layer2",
    "final_linear",
    "final_norm",
    "head",
    "last_layer",
    "norm_out",
    "out",
    "proj_out",
)


class Island(Opaque):
    """Stands for the forward of a layer: 16-bit inputs are raised to float32, and the result rounded back.

    Its weights follow, as ComfyUI's layers cast them to their input. One of the compiler's stand-ins, so that code
    compiled with it serves every model of the kind. eager: what the layer would run without it.
    """

    def __init__(self, layer: torch.nn.Module, rounds: bool) -> None:
        super().__init__(layer)
        self.rounds = rounds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raised = map(_raised, args)
        result = self.eager(*raised, **{name: _raised(value) for name, value in kwargs.items()})
        return result.to(args[0].dtype) if self.rounds else result


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value


def find_islands(network: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, bool]]:
    """(layer, whether its result is rounded back) of each island in a network.

    That of the final layers is not, as nothing calculates with it any more but ComfyUI, in float32.
    """
    final = [layer for name, layer in network.named_children() if name in FINAL_LAYERS]
    inside = {id(module) for layer in final for module in layer.modules()}
    for layer in final:
        if any(True for _ in layer.parameters()) or _is_norm(layer):
            yield layer, False
    for module in network.modules():
        if id(module) not in inside and _is_norm(module):
            yield module, True


def _is_norm(module: torch.nn.Module) -> bool:
    own = type(module).__name__ in NORM_NAMES and next(module.children(), None) is None
    return own or isinstance(module, NORMS)
