"""How one node's streamed models are streamed: its settings, the plans made by them, and the weights on their way."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ...quant_backends.core.errors import SnugError
from ...quant_backends.memory.plan import Block, OffloadPlan, make_plan, size_text
from ...quant_backends.memory.spill import FileBacked, spill
from .offload_streaming import Streaming, transfer_to
from .offload_units import BLOCK, Place, Unit, distribute, mark_streamed, offload_units, other_bytes


@dataclass(frozen=True)
class OffloadSettings:
    """level: BLOCK or LEAF; blocks_per_group: the most units that are copied at once; prefetch: groups copied ahead, 0:
    none, None: what the plan finds best; pin: whether the host's copy is pinned; limit: bytes that this model's
    weights may take on the device, slots included, None: all that can be streamed is; to_disk: weights stay in their
    files, or go to one, instead of the host's memory.
    """

    level: str = BLOCK
    blocks_per_group: int = 1
    prefetch: int | None = None
    pin: bool = True
    limit: int | None = None
    to_disk: bool = False


class Offloading:
    """What a streamed patcher and its clones share: the settings, and the weights that are being streamed.

    Clones of a model are loaded in turns, and share the slab unless the weights differ. It is closed with the last
    of them.
    """

    def __init__(self, settings: OffloadSettings) -> None:
        self.settings = settings
        self.loaded_by: int | None = None  # id of the patcher that is loaded, or was the last one
        self.passes_on = False  # what is detached goes to another patcher of ours
        self._streams: weakref.WeakKeyDictionary[torch.nn.Module, Streaming] = weakref.WeakKeyDictionary()
        self._plans: dict[tuple[int, tuple[Block, ...]], OffloadPlan] = {}
        weakref.finalize(self, _close_all, self._streams).atexit = False

    def units(self, model: torch.nn.Module) -> list[Unit]:
        return offload_units(model, self.settings.level)

    def plan(self, model: torch.nn.Module, units: Sequence[Unit]) -> OffloadPlan:
        """Raises SnugError when the model cannot be run within the limit."""
        settings, others = self.settings, other_bytes(model, units)
        blocks = tuple(unit.block for unit in units)
        key = (others, blocks)
        if key not in self._plans:
            if not blocks:
                raise SnugError(
                    f"This model ({type(model).__name__}) has no blocks that could be offloaded one by one; "
                    f"bypass this node and let ComfyUI offload it (start option --lowvram)."
                )
            if settings.limit is not None and settings.limit < others:
                raise SnugError(
                    f"{size_text(settings.limit)} of GPU memory do not hold the layers outside of the model's blocks "
                    f"({size_text(others)}); allow more."
                )
            self._plans[key] = make_plan(
                blocks,
                limit=None if settings.limit is None else settings.limit - others,
                blocks_per_group=settings.blocks_per_group,
                prefetch=settings.prefetch,
            )
        return self._plans[key]

    def stream(self, model: torch.nn.Module, units: Sequence[Unit], plan: OffloadPlan, device: Any) -> int:
        """Starts to stream, or goes on. Returns what the slots take on the device."""
        streaming = self._streams.get(model)
        if streaming is None or not streaming.is_of(units, plan):
            self.close(model)
            transfer = transfer_to(device, self.settings.pin, self.settings.to_disk)
            if transfer is None:
                return 0
            if self.settings.to_disk and device.type != "cpu":
                move_to_disk([place for index in plan.streamed for place in units[index].places])
            bar = comfy.utils.ProgressBar(2 * plan.slab_bytes)  # each block is looked at, then copied

            def on_copied(nbytes: int) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update(nbytes)

            streaming = self._streams[model] = Streaming(model, units, plan, transfer, on_copied)
        streaming.install()
        streaming.copy_anew()  # others may have written into the weights since they were copied
        streaming.prefetch()
        return streaming.slot_bytes

    def streaming(self, model: torch.nn.Module) -> Streaming | None:
        return self._streams.get(model)

    def close(self, model: torch.nn.Module) -> None:
        streaming = self._streams.pop(model, None)
        if streaming is not None:
            streaming.close()


@torch.inference_mode(False)
def move_to_disk(places: Sequence[Place]) -> None:
    """Puts weights that come from no file into one in ComfyUI's temporary folder. Raises SnugError when it is full."""
    file_backed = FileBacked()
    places = [
        place
        for place in places
        if place.is_current and not all(map(file_backed.__contains__, place.tensors))
    ]
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    spilled = spill([tensor for place in places for tensor in place.tensors], folder)
    for place, part in distribute(places, spilled):
        place.keep_in(part)


def _close_all(streams: weakref.WeakKeyDictionary[torch.nn.Module, Streaming]) -> None:
    for model, streaming in list(streams.items()):
        streaming.close()
        mark_streamed(model, ())
