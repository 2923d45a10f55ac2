"""A tiny model of packed and plain layers on a simulated device: what it computes is what resident weights give."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from random_packed import random_packed
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.linear import linear
from snug.quant_backends.memory.executor import GroupOffload
from snug.quant_backends.memory.plan import Block, make_plan
from snug.quant_backends.memory.simulated import SimulatedDevice, SimulatedTransfer

WIDTH = 256


@dataclasses.dataclass(frozen=True)
class Layer:
    """x + linear(norm(x) * scale); its tensors are the packed weight's, the bias and the norm's scale."""

    weight: PackedTensor
    bias: torch.Tensor
    scale: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.weight.data, *self.weight.parts.values(), self.bias, self.scale]

    def over(self, tensors: tuple[torch.Tensor, ...]) -> Layer:
        """The same layer with its tensors elsewhere."""
        data, *parts, bias, scale = tensors
        named = dict(zip(self.weight.parts, parts, strict=True))
        return Layer(dataclasses.replace(self.weight, data=data, parts=named), bias, scale)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.layer_norm(x, (WIDTH,)) * self.scale
        return x + linear(normed, self.weight, self.bias)


@pytest.mark.parametrize("name", ["bnb-nf4-64", "int8-rows", "float8_e4m3fn-rows", "quanto-int4-128"])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_streaming_changes_no_bit_of_the_result(name: str, prefetch: int) -> None:
    layers = [
        Layer(random_packed(name, (WIDTH, WIDTH), seed=seed), torch.rand(WIDTH), torch.rand(WIDTH))
        for seed in range(12)
    ]
    blocks = [
        Block(str(number), tuple(tensor.nbytes for tensor in layer.tensors), 1.0)
        for number, layer in enumerate(layers)
    ]
    plan = make_plan(blocks, keep=3 * blocks[0].nbytes, prefetch=prefetch)
    offload = GroupOffload(plan, lambda block: layers[block].tensors, SimulatedTransfer(SimulatedDevice()))
    x = torch.randn(5, WIDTH)
    for step in range(4):
        wanted = found = x
        for number, layer in enumerate(layers[: 7 if step == 1 else None]):  # the second step is broken off
            wanted = layer(wanted)
            found = layer.over(offload.acquire(number))(found)
            offload.release(number)
        assert torch.equal(found, wanted)
    offload.close()
