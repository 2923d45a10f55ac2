"""Group offloading: a MODEL or CLIP whose blocks come to the GPU one group at a time, the next while one computes.

Without dynamic VRAM a patcher of its own lets ComfyUI load what stays, keeps the streamed blocks in ComfyUI's low-VRAM
state, and streams them (offload_streaming). With dynamic VRAM ComfyUI pages weights itself; there the patcher only
tells it how much may stay on the GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import torch

from ...quant_backends.core.errors import SnugError
from ...quant_backends.memory.plan import Block, OffloadPlan, make_plan
from .compat import is_dynamic
from .offload_streaming import Streaming, transfer_to
from .offload_units import BLOCK, Unit, is_streamed, mark_streamed, offload_units, other_bytes

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher as _Base
else:
    _Base = object

ATTACHMENT = "snug_group_offload"
# To ComfyUI: as much memory as you like.
WHOLE = 1e32
# What ComfyUI's dynamic VRAM pages at a time.
PAGE_BYTES = 32 << 20


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


def offload_model(patcher: Any, settings: OffloadSettings) -> tuple[Any, str]:
    """(a clone of a MODEL that is streamed, the plan as text).

    Raises SnugError when the model has no blocks, or cannot be run within the limit.
    """
    clone = adopt_offloading(patcher.clone())
    clone.attachments[ATTACHMENT] = Offloading(settings)
    return clone, clone.offload_report()


def offload_clip(clip: Any, settings: OffloadSettings) -> tuple[Any, str]:
    """The same for a CLIP."""
    new = clip.clone()
    new.patcher, report = offload_model(clip.patcher, settings)
    return new, report


class Offloading:
    """What a streamed patcher and its clones share: the settings, and the weights that are being streamed.

    Clones of a model are loaded in turns, and share the slab unless the weights differ. It is closed with the last
    of them.
    """

    def __init__(self, settings: OffloadSettings) -> None:
        self.settings = settings
        self.loaded_by: int | None = None  # id of the patcher that was loaded last
        self.passes_on = False  # the next patcher to be loaded is one of ours, too
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
                    f"{gigabytes(settings.limit)} of GPU memory do not hold the layers outside of the model's blocks "
                    f"({gigabytes(others)}); allow more."
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
        self.passes_on = False
        streaming = self._streams.get(model)
        if streaming is None or not streaming.is_of(units, plan):
            self.close(model)
            transfer = transfer_to(device, self.settings.pin, self.settings.to_disk)
            if transfer is None:
                return 0
            bar = comfy.utils.ProgressBar(2 * plan.slab_bytes)  # each block is looked at, then copied

            def on_copied(nbytes: int) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update(nbytes)

            streaming = self._streams[model] = Streaming(model, units, plan, transfer, on_copied)
        streaming.install()
        return streaming.slot_bytes

    def streaming(self, model: torch.nn.Module) -> Streaming | None:
        return self._streams.get(model)

    def close(self, model: torch.nn.Module) -> None:
        streaming = self._streams.pop(model, None)
        if streaming is not None:
            streaming.close()


def _close_all(streams: weakref.WeakKeyDictionary[torch.nn.Module, Streaming]) -> None:
    for streaming in list(streams.values()):
        streaming.close()


class OffloadPatcher(_Base):
    """Mixin before a ModelPatcher of any kind."""

    _shown: tuple[set[torch.nn.Module], bool] | None = None

    @property
    def offloading(self) -> Offloading:
        return self.attachments[ATTACHMENT]

    def offload_report(self) -> str:
        """The plan as text. Raises SnugError when there is none."""
        units = self.offloading.units(self.model)
        plan = self.offloading.plan(self.model, units)
        others = f"{gigabytes(other_bytes(self.model, units))} of other layers stay on the GPU."
        if is_dynamic(self):
            return (
                f"ComfyUI pages this model's weights itself (dynamic VRAM); at most {gigabytes(self._page_limit())} "
                f"of them stay on the GPU."
            )
        if self.load_device.type == "cpu":
            return f"This model runs on the CPU, where its weights are: nothing is copied. On a GPU: {plan.report()} {others}"
        if transfer_to(self.load_device, False, False) is None:
            return f"{plan.report()} {others} This device cannot copy and compute at once: ComfyUI copies layer by layer."
        return f"{plan.report()} {others}"

    # ---- loading -----------------------------------------------------------------------------------------------

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **options: Any,
    ) -> Any:
        if is_dynamic(self):
            result = super().load(device_to, lowvram_model_memory, force_patch_weights, full_load, **options)
            self._limit_pages()
            return result
        streaming = self.offloading.streaming(self.model)
        if streaming is not None:
            streaming.uninstall()
        units = self.offloading.units(self.model)
        plan = self.offloading.plan(self.model, units)
        layers = {place.module for index in plan.streamed for place in units[index].places}
        mark_streamed(self.model, layers)
        with self._showing(layers, True):
            if any(getattr(layer, "comfy_patched_weights", False) for layer in layers):
                super().partially_unload(self.offload_device, WHOLE)  # another clone has loaded them
            super().load(device_to, 0, force_patch_weights, False, **options)
        with self._showing(layers, False):
            slots = plan.slots * plan.slot_bytes
            memory = WHOLE if full_load else max(lowvram_model_memory - slots, 1)
            super().load(device_to, memory, force_patch_weights, False, **options)
        self._load_loose_parameters(layers)
        self.model.model_lowvram = True
        self.offloading.loaded_by = id(self)
        slots = self.offloading.stream(self.model, units, plan, self.load_device)
        self.model.model_loaded_weight_memory += slots
        return None

    def _load_loose_parameters(self, streamed: set[torch.nn.Module]) -> None:
        """Parameters beside layers in one module, which core moves only where it loads everything."""
        for module in self.model.modules():
            has_layers = any(True for child in module.children() for _ in child.parameters())
            if has_layers and module not in streamed:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self.load_device)

    def partially_load(self, device_to: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamic(self):
            return super().partially_load(device_to, *args, **kwargs)
        self.model.model_lowvram = True  # else core loads nothing where another clone has loaded everything
        loaded = super().partially_load(device_to, *args, **kwargs)
        streaming = self.offloading.streaming(self.model)
        if streaming is not None:  # core may have taken memory back instead of loading
            streaming.install()
        return loaded

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> Any:
        freed = super().partially_unload(device_to, memory_to_free, *args, **kwargs)
        streaming = None if is_dynamic(self) else self.offloading.streaming(self.model)
        if self._shown is None and streaming is not None and freed < memory_to_free:
            slots = streaming.free()
            self.model.model_loaded_weight_memory -= slots
            freed += slots
        return freed

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        self._pause()
        return super().unpatch_model(device_to, unpatch_weights)

    def detach(self, unpatch_all: bool = True) -> Any:
        is_loaded = self.offloading.loaded_by == id(self)
        if unpatch_all or (is_loaded and not self.offloading.passes_on):
            self.offloading.close(self.model)
            mark_streamed(self.model, ())
        self._pause()
        return super().detach(unpatch_all)

    def cleanup(self) -> None:
        streaming = self.offloading.streaming(self.model)
        if streaming is not None:
            streaming.restore()  # after a step that was broken off
        super().cleanup()

    def __del__(self) -> None:
        """Core detaches patchers that nobody needs any more; clones of this one may."""
        if ATTACHMENT in self.__dict__.get("attachments", ()):
            self.offloading.passes_on = True
            super().__del__()

    def _pause(self) -> None:
        """Takes the streaming off the model, so that its weights are what ComfyUI knows, until it is loaded again."""
        streaming = self.offloading.streaming(self.model)
        if streaming is not None and self.offloading.loaded_by == id(self):
            streaming.uninstall()

    def is_clone(self, other: Any) -> bool:
        """Core asks the one that it is going to load, about those that it takes off for that."""
        found = super().is_clone(other)
        if found and isinstance(other, OffloadPatcher) and other.offloading is self.offloading:
            self.offloading.passes_on = True
        return found

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return adopt_offloading(super().clone(*args, **kwargs))

    def pin_weight_to_device(self, key: str) -> None:
        """Streamed weights are pinned in the slab."""
        layer = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
        if not is_streamed(layer):
            super().pin_weight_to_device(key)

    # ---- what core sees while it loads -------------------------------------------------------------------------

    @contextmanager
    def _showing(self, layers: set[torch.nn.Module], are_shown: bool) -> Iterator[None]:
        """Lets core load `layers` alone, or all others."""
        self._shown = (layers, are_shown)
        try:
            yield
        finally:
            del self._shown

    def _load_list(self, *args: Any, **kwargs: Any) -> Any:
        entries = super()._load_list(*args, **kwargs)
        if self._shown is None:
            return entries
        layers, are_shown = self._shown
        return [entry for entry in entries if (entry[-2] in layers) == are_shown]

    def get_all_callbacks(self, call_type: str) -> Any:
        """Loading in two parts is one loading to others."""
        if self._shown is not None and self._shown[1]:
            return []
        return super().get_all_callbacks(call_type)

    # ---- dynamic VRAM ------------------------------------------------------------------------------------------

    def _page_limit(self) -> int:
        return max(self.offloading.settings.limit or 0, PAGE_BYTES)

    def _limit_pages(self) -> None:
        """Core forgets it after every node, and loads the model anew in each."""
        pages = self.model.dynamic_vbars.get(self.load_device)
        if pages is not None and hasattr(pages, "set_watermark_limit"):
            pages.set_watermark_limit(max(self._page_limit() - self.model.model_loaded_weight_memory, PAGE_BYTES))


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GB"


@lru_cache
def _offload_class(base: type) -> type:
    return type(f"Offloaded{base.__name__}", (OffloadPatcher, base), {})


def adopt_offloading(patcher: Any) -> Any:
    """Turns a patcher into one that streams; a second one on the same model would register with dynamic VRAM twice."""
    if not isinstance(patcher, OffloadPatcher):
        patcher.__class__ = _offload_class(type(patcher))
    return patcher
