"""Streams the blocks of a loaded model: has a block's weights on the device while it runs, and nowhere else.

While a block runs, the parameters of its layers are ones that lie in a slot on the device; before and after they are
those that ComfyUI knows, in the host's memory. ComfyUI casts, patches and counts them as it does in low-VRAM mode,
finding a weight that is where it is needed already. Whatever happens to bypass this (a block that another node runs
in its own way, memory that was freed in between) is slower and just as right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...quant_backends.memory.executor import GroupOffload
from ...quant_backends.memory.plan import OffloadPlan
from ...quant_backends.memory.spill import FileBacked
from ...quant_backends.memory.transfer import (
    DirectTransfer,
    DiskTransfer,
    SlabTransfer,
    StreamTransfer,
    Transfer,
)
from .offload_units import Place, Unit, distribute, remember_order

# Attribute of a block and of the layers in it: (Streaming, number of their unit), while their model is streamed.
STREAMED_UNIT = "snug_streamed_unit"
# Key of the hooks. torch gives out a new one whenever a hook is registered, and compiled code that went through the
# block would be compiled again for it.
_HOOK: Any = "snug_streamed_unit"


def transfer_to(device: torch.device, pin: bool, from_disk: bool) -> Transfer | None:
    """How weights get to `device`; None where torch has no streams to copy on beside computing."""
    if device.type == "cpu":
        return DirectTransfer()
    if device.type in ("cuda", "xpu"):
        return DiskTransfer(device, pin) if from_disk else StreamTransfer(device, pin)
    return None


class Streaming:
    """The streamed weights of one model.

    model: whose units they are; it learns the order in which they ran. units: all of them, in the order of the plan.
    transfer: not yet opened. on_copied: called with bytes as weights are copied into the slab, for progress; what it
    raises ends the copying, and nothing is kept.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        units: Sequence[Unit],
        plan: OffloadPlan,
        transfer: Transfer,
        on_copied: Callable[[int], None],
    ) -> None:
        self.units = list(units)
        self.plan = plan
        self._model = model
        self._on_copied: Callable[[int], None] | None = on_copied
        self._in_slots: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        self._running: int | None = None
        self._replaced: list[Place] = []
        self._order: list[int] = []
        self._last_seen: int | None = None
        self._knows_order = False
        self._wrapped: list[LayerForward] = []
        self._hooked: list[torch.nn.Module] = []
        self._streamed = plan.streamed
        streamed = [tensor for index in self._streamed for tensor in self.units[index].tensors]
        if isinstance(transfer, SlabTransfer) and not any(map(FileBacked().__contains__, streamed)):
            transfer.on_staged = self._keep_in_slab  # else the weights would be in memory twice
        self._offload = GroupOffload(plan, self._source, transfer)
        self._on_copied = None

    @property
    def is_open(self) -> bool:
        return self._offload.is_open

    @property
    def late_copies(self) -> int:
        """Copies that a block had to wait for because it did not follow the one before."""
        return self._offload.late_copies

    def is_of(self, units: Sequence[Unit], plan: OffloadPlan) -> bool:
        """Whether the bytes that are streamed are those of `units`; if so, their parameters are taken over."""
        if not self.is_open or plan != self.plan or len(units) != len(self.units):
            return False
        for index in self._streamed:
            mine, others = self.units[index].tensors, units[index].tensors
            if [tensor.data_ptr() for tensor in mine] != [tensor.data_ptr() for tensor in others]:
                return False
        self.units = list(units)
        self._in_slots.clear()
        return True

    def prefetch(self) -> None:
        """Starts the copies for the first blocks, before they are asked for."""
        self._offload.prefetch()

    def copy_anew(self) -> None:
        """Weights have changed where they are: copies of them are made again before they are used."""
        self._offload.copy_anew()

    # ---- around a unit ---------------------------------------------------------------------------------------

    def before(self, index: int) -> None:
        """Puts the unit's weights on the device in place of those that ComfyUI knows."""
        self.restore()  # of a unit that was broken off
        self._notice(index)
        self._running = index
        if not self.is_open or index not in self._streamed:
            return
        tensors = self._offload.acquire(index)
        unit = self.units[index]
        # Not the first address alone: empty tensors have none.
        key = (index, *(tensor.data_ptr() for tensor in tensors))
        if key not in self._in_slots:
            self._in_slots[key] = [place.over(part) for place, part in distribute(unit.places, tensors)]
        for place, parameter in zip(unit.places, self._in_slots[key], strict=True):
            if place.is_current:
                self._replaced.append(place)
                place.module._parameters[place.name] = parameter

    def after(self, index: int) -> None:
        if self._running == index:
            self.restore()
            self._offload.release(index)

    def switch_to(self, index: int) -> None:
        """The same as `before`, where nothing says when a unit ends but the beginning of another one."""
        if self._running != index:
            if self._running is not None:
                self.after(self._running)
            self.before(index)

    def restore(self) -> None:
        """Gives the unit that ran last the parameters back that ComfyUI knows."""
        self._running = None
        while self._replaced:
            place = self._replaced.pop()
            place.module._parameters[place.name] = place.original

    def _notice(self, index: int) -> None:
        """Learns the order of execution, for the next time that a plan is made."""
        if self._knows_order or index == self._last_seen:
            return
        self._last_seen = index
        if index not in self._order:
            self._order.append(index)
            if len(self._order) < len(self.units):
                return
        # Every unit has run, or the next step has begun, and those that were not seen do not run.
        self._knows_order = True
        order = [*self._order, *(number for number in range(len(self.units)) if number not in self._order)]
        if order != sorted(order):
            remember_order(self._model, [self.units[number].name for number in order])

    # ---- on the model ----------------------------------------------------------------------------------------

    def install(self) -> None:
        """Lets the model's modules call `before` and `after`."""
        if self._hooked or self._wrapped:
            return
        for index, unit in enumerate(self.units):
            for module in (unit.module, *(place.module for place in unit.places)):
                module.__dict__[STREAMED_UNIT] = (self, index)
            if hasattr(unit.module, "comfy_cast_weights"):
                self._wrapped.append(LayerForward(unit.module))
            else:
                self._hooked.append(unit.module)
                unit.module._forward_pre_hooks[_HOOK] = _before_block
                unit.module._forward_hooks[_HOOK] = _after_block
                unit.module._forward_hooks_always_called[_HOOK] = True

    def uninstall(self) -> None:
        self.restore()
        if not self._hooked and not self._wrapped:
            return  # what is on the modules now is another one's
        for block in self._hooked:
            for hooks in (block._forward_pre_hooks, block._forward_hooks, block._forward_hooks_always_called):
                hooks.pop(_HOOK, None)
        for wrapped in self._wrapped:
            wrapped.remove()
        self._hooked, self._wrapped = [], []
        for unit in self.units:
            for module in (unit.module, *(place.module for place in unit.places)):
                module.__dict__.pop(STREAMED_UNIT, None)

    def close(self) -> None:
        """Frees the memory on both sides and takes everything off the model. May be called twice."""
        self.uninstall()
        self.free()

    def free(self) -> int:
        """Frees the memory on both sides; blocks run on without. Returns the bytes that this frees on the device."""
        self.restore()
        freed = self.slot_bytes
        self._in_slots.clear()
        self._offload.close()
        return freed

    @property
    def slot_bytes(self) -> int:
        """What all slots take on the device."""
        return self._offload.slot_bytes

    def _keep_in_slab(self, index: int, tensors: tuple[torch.Tensor, ...]) -> None:
        for place, part in distribute(self.units[index].places, tensors):
            place.keep_in(part)

    def _source(self, index: int) -> list[torch.Tensor]:
        tensors = self.units[index].tensors
        if self._on_copied is not None:
            self._on_copied(sum(tensor.nbytes for tensor in tensors))
        return tensors


# Hooks are plain functions, the same for all blocks, so that a compiler that looks at them finds no difference. In a
# model that is compiled as a whole they do not run: there its layers call `bring`.


def _before_block(module: torch.nn.Module, _args: Any) -> None:
    if not torch.compiler.is_compiling() and STREAMED_UNIT in module.__dict__:
        streaming, index = module.__dict__[STREAMED_UNIT]
        streaming.before(index)


def _after_block(module: torch.nn.Module, _args: Any, _result: Any) -> None:
    if not torch.compiler.is_compiling() and STREAMED_UNIT in module.__dict__:
        streaming, index = module.__dict__[STREAMED_UNIT]
        streaming.after(index)


def bring(layer: torch.nn.Module) -> None:
    """Has the unit of a layer that compiled code is going to use on the device, if it is streamed."""
    streaming, index = layer.__dict__.get(STREAMED_UNIT, (None, 0))
    if streaming is not None:
        streaming.switch_to(index)


class LayerForward:
    """The forward of a layer that is streamed by itself."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._previous = layer.__dict__.get("forward")
        self._forward = layer.forward
        layer.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            STREAMED_UNIT not in self._layer.__dict__
        ):  # no longer streamed, but another node goes on to call this
            return self._forward(*args, **kwargs)
        streaming, index = self._layer.__dict__[STREAMED_UNIT]
        streaming.before(index)
        try:
            return self._forward(*args, **kwargs)
        finally:
            streaming.after(index)

    def remove(self) -> None:
        attributes = self._layer.__dict__
        if attributes.get("forward") is not self:
            return  # another node has put its own around this one
        if self._previous is None:
            del attributes["forward"]
        else:
            attributes["forward"] = self._previous
