"""What a model is streamed by: its blocks or layers in the order of execution, and the tensors of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import comfy.quant_ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...quant_backends.memory.plan import Block, aligned

BLOCK = "block"
LEAF = "leaf"

# Those that consist of plain tensors; ComfyUI 0.3.75 has a class of its own.
_QUANTIZED: Any = (QuantizedTensor, comfy.quant_ops.QuantizedTensor)

# Attribute of a layer whose weights are streamed.
_IS_STREAMED = "snug_is_streamed"
# Attribute of a model: the names of its units in the order in which they ran, where the modules' order is another.
_ORDER = "snug_execution_order"


@dataclasses.dataclass(eq=False)
class Place:
    """One parameter of a module. original: the parameter that ComfyUI knows, in the host's memory."""

    module: torch.nn.Module
    name: str
    original: torch.nn.Parameter

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its plain tensors: itself, or the codes and scales of a quantized weight."""
        return _plain_tensors(self.original) or ()

    def over(self, tensors: Sequence[torch.Tensor]) -> torch.nn.Parameter:
        """The same weight in other memory. A tensor of inference mode where the original is: modules are moved and
        saved in the mode that they were loaded in, where quantized tensors made in the other one cannot be.
        """
        weight: Any = self.original
        with torch.inference_mode(weight.is_inference()):
            if not isinstance(weight, _QUANTIZED):
                return torch.nn.Parameter(tensors[0], requires_grad=False)
            names, form = weight.__tensor_flatten__()
            parts = dict(zip(names, tensors, strict=True))
            moved = weight.__tensor_unflatten__(parts, form, weight.shape, weight.stride())
            return torch.nn.Parameter(moved, requires_grad=False)

    def keep_in(self, tensors: Sequence[torch.Tensor]) -> None:
        """Lets the module keep the same weight in other memory from now on; not in place of another weight."""
        if self.is_current:
            self.original = self.over(tensors)
            self.module._parameters[self.name] = self.original

    @property
    def is_current(self) -> bool:
        """Whether the module still has the parameter that is streamed; core puts others in its place to merge patches
        into them for saving.
        """
        return self.module._parameters.get(self.name) is self.original


@dataclasses.dataclass(eq=False)
class Unit:
    """What is on the device as a whole while it computes: a block, or a layer."""

    name: str
    module: torch.nn.Module
    places: list[Place]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for place in self.places for tensor in place.tensors]

    @property
    def block(self) -> Block:
        """For the plan."""
        return Block(self.name, tuple(tensor.nbytes for tensor in self.tensors))


def distribute(
    places: Sequence[Place], tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[Place, Sequence[torch.Tensor]]]:
    """Each place with its part of `tensors`, which are in the order of the places."""
    start = 0
    for place in places:
        count = len(place.tensors)
        yield place, tensors[start : start + count]
        start += count


def offload_units(model: torch.nn.Module, level: str) -> list[Unit]:
    """The blocks of a model (BLOCK) or the layers in them (LEAF), in the order of execution; empty ones left out.

    What is in no block, such as embedders and the last layer, belongs to no unit: ComfyUI loads it.
    """
    blocks = list(_blocks(model, ""))
    if level == LEAF:
        blocks = [
            (f"{name}.{inner}" if inner else name, layer)
            for name, block in blocks
            for inner, layer in block.named_modules()
            if hasattr(layer, "comfy_cast_weights")
        ]
    units = [Unit(name, module, list(_places(module))) for name, module in blocks]
    units = [unit for unit in units if unit.places]
    known: tuple[str, ...] = getattr(model, _ORDER, ())
    order = {name: number for number, name in enumerate(known)}
    return sorted(units, key=lambda unit: order.get(unit.name, len(order)))


def mark_streamed(model: torch.nn.Module, layers: Collection[torch.nn.Module]) -> None:
    """Lets `is_streamed` be true for `layers` and no others of the model."""
    for module in model.modules():
        module.__dict__.pop(_IS_STREAMED, None)
    for layer in layers:
        layer.__dict__[_IS_STREAMED] = True


def is_streamed(layer: Any) -> bool:
    """Whether a layer's weights come to the device for each step, and are on the host in between."""
    return _IS_STREAMED in layer.__dict__


def remember_order(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Lets `offload_units` return the units in the order in which they were seen to run."""
    model.__dict__[_ORDER] = tuple(names)


def other_bytes(model: torch.nn.Module, units: Sequence[Unit]) -> int:
    """Bytes of the parameters that belong to no unit."""
    inside = {id(place.original) for unit in units for place in unit.places}
    others = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in inside}
    tensors = (_plain_tensors(parameter) or (parameter,) for parameter in others.values())
    return sum(aligned(tensor.nbytes) for found in tensors for tensor in found)


def _blocks(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Members of lists of modules. Sequences of layers in such a list, as U-Nets have them, are lists themselves.

    Single layers are no blocks: where they are members of a list, they are small (embedders, the first
    convolution).
    """
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if _is_list(child):
            for member_name, member in _members(child, name):
                if any(True for _ in member.children()):
                    yield member_name, member
        else:
            yield from _blocks(child, f"{name}.")


def _members(group: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    for key, member in group.named_children():
        name = f"{prefix}.{key}"
        if _is_list(member):
            yield from _members(member, name)
        else:
            yield name, member


def _is_list(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential))


def _places(block: torch.nn.Module) -> Iterator[Place]:
    """Parameters of ComfyUI's layers, and those that blocks own themselves.

    The layers of other kinds are ComfyUI's: it loads them whatever happens, as they cannot be cast.
    """
    for module in block.modules():
        is_leaf = not any(True for child in module.children() for _ in child.parameters())
        if is_leaf and not hasattr(module, "comfy_cast_weights"):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if _plain_tensors(parameter) is not None:
                yield Place(module, name, parameter)


def _plain_tensors(parameter: Any) -> tuple[torch.Tensor, ...] | None:
    """None for the tensor classes of other packs, which ComfyUI moves as it does without offloading."""
    if isinstance(parameter, _QUANTIZED):
        names, _ = parameter.__tensor_flatten__()
        return tuple(getattr(parameter, name) for name in names)
    if type(parameter) is torch.nn.Parameter and not parameter.is_meta:
        return (parameter.data,)
    return None
