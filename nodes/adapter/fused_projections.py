"""Quantized layers of one attention that share an input (query, key, value), multiplied as one.

The first of them that is called decodes the weights of all, LoRA included, into one matrix and multiplies once; the
results of the others wait until they are called with the same input. No weight is copied or kept.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.kernels.eight_bit import PRODUCTS
from ...quant_backends.kernels.linear import CPU_TILE
from .layout import is_packed, packed_tensor
from .operations import PackedLinear

# Names of layers beside each other, by model family; all of a row take the same tensor in self-attention.
GROUPS = (
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("to_q_t", "to_k_t", "to_v_t"),
    ("w1q", "w1k", "w1v"),
    ("w2q", "w2k", "w2v"),
    ("k_img", "v_img"),
)
# Where the query comes from elsewhere than key and value: names of the attention, and of its class.
CROSS_NAMES = re.compile(r"(^|\.)attn2$|cross")
CROSS_CLASSES = re.compile(r".Cross|Cross(?!Attention$)")


class FusedProjections:
    """layers: at least two, of the same number of inputs.

    That they share their input is known from their names alone. So results are given out only for the very tensor
    that they were calculated from, which the first time is compared as well, lest a model writes to it between the
    calls; after a surprise the layers calculate by themselves.
    """

    def __init__(self, layers: list[PackedLinear]) -> None:
        self.layers = layers
        self.trusted = True
        self._checked: set[int] = set()
        self._waiting = threading.local()

    def forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What layer `index` makes of x [..., in]: [..., out] in x's dtype."""
        results: dict[int, torch.Tensor] = getattr(self._waiting, "results", {})
        if index in results:
            if self._is_input(index, x):
                result = results.pop(index)
                if not results:
                    self.forget()
                return result
            self.trusted = False
        self.forget()
        if not self.trusted or not self._worthwhile(x):
            return self.alone(index, x)
        parts = dict(enumerate(self.together(x)))
        result = parts.pop(index)
        self._waiting.input, self._waiting.results = x, parts
        if len(self._checked) + 1 < len(self.layers):
            self._waiting.copy = x.clone()
        return result

    def forget(self) -> None:
        """Drops what this thread has not asked for."""
        self._waiting.__dict__.clear()

    def _is_input(self, index: int, x: torch.Tensor) -> bool:
        if self._waiting.input is not x:
            return False
        copy = getattr(self._waiting, "copy", None)
        if copy is not None:
            if not torch.equal(copy, x):
                return False
            self._checked.add(index)
        return True

    def _worthwhile(self, x: torch.Tensor) -> bool:
        """On a CPU large weights are better decoded and multiplied tile by tile, each layer for itself."""
        if not all(map(_decodes, self.layers)):
            return False
        weights = sum(layer.out_features for layer in self.layers) * self.layers[0].in_features
        return x.device.type != "cpu" or weights <= CPU_TILE

    def alone(self, index: int, x: torch.Tensor) -> torch.Tensor:
        layer = self.layers[index]
        return type(layer).forward(layer, x)

    def together(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = [layer.out_features for layer in self.layers]
        joint = x.new_empty((sum(rows), x.shape[-1]))
        biases = []
        for layer, part in zip(self.layers, joint.split(rows), strict=True):
            with layer.cast_weight(x) as (weight, bias):
                if is_packed(weight) and not layer.patched():
                    dequantize_packed(packed_tensor(weight), x.dtype, out=part)
                else:
                    part.copy_(layer.dense_weight(weight, x.dtype))
                # A copy: ComfyUI may use the memory of a bias that it has moved for the next one.
                biases.append(x.new_zeros(len(part)) if bias is None else bias.clone())
        bias = torch.cat(biases) if any(layer.bias is not None for layer in self.layers) else None
        return F.linear(x, joint, bias).split(rows, -1)


def _decodes(layer: PackedLinear) -> bool:
    """Whether the layer decodes its weight for each call; LoRA beside the weight, or kept merged, copies of the weight
    and products in 8 bits are other ways."""
    patches = layer.weight_patches
    if layer.weight_copy is not None or layer.product is not None:
        return False
    if not is_packed(layer.weight) or isinstance(packed_tensor(layer.weight).format, PRODUCTS):
        return False
    return patches is None or (patches.branch is None and patches.kept is None)


def find_projections(network: torch.nn.Module) -> Iterator[FusedProjections]:
    """The groups of packed layers that, by their names, share an input."""
    for name, module in network.named_modules():
        children = dict(module.named_children())
        is_cross = bool(CROSS_NAMES.search(name) or CROSS_CLASSES.search(type(module).__name__))
        for names in GROUPS:
            names = names[-2:] if is_cross else names
            layers = [layer for layer in map(children.get, names) if isinstance(layer, PackedLinear)]
            packed = [layer for layer in layers if is_packed(layer.weight)]
            if len(packed) > 1 and len({layer.in_features for layer in packed}) == 1:
                yield FusedProjections(packed)


def fused_forward(group: FusedProjections, index: int) -> Any:
    """The forward of one layer of the group."""

    def forward(input: torch.Tensor) -> torch.Tensor:
        return group.forward(index, input)

    return forward
