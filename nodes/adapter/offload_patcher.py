"""The model patcher of models whose blocks are streamed.

Without dynamic VRAM it lets ComfyUI load what stays, keeps the streamed blocks in ComfyUI's low-VRAM state, and streams
them (offload_streaming). With dynamic VRAM ComfyUI pages weights itself; there it only says how much may stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import torch

from ...quant_backends.memory.plan import size_text
from .compat import is_dynamic, is_low_vram_patch
from .offload_streaming import transfer_to
from .offload_units import is_streamed, mark_streamed, other_bytes
from .offloading import Offloading
from .patches import WeightPatches, adapter_bytes

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher as _Base
else:
    _Base = object

# Under which the patcher keeps its Offloading.
ATTACHMENT = "snug_group_offload"
# To ComfyUI: as much memory as you like.
WHOLE = 1e32
# What ComfyUI's dynamic VRAM pages at a time.
PAGE_BYTES = 32 << 20


class OffloadPatcher(_Base):
    """Mixin before a ModelPatcher of any kind."""

    _shown: tuple[set[torch.nn.Module], bool] | None = None

    @property
    def offloading(self) -> Offloading:
        return self.attachments[ATTACHMENT]

    def offload_report(self) -> str:
        """The plan as text, and what becomes of it on this device. Raises SnugError when there is none."""
        if self.load_device.type != "cpu":
            return self.plan_report()
        return f"This model runs on the CPU, where its weights are: nothing is copied. On a GPU: {self.plan_report()}"

    def plan_report(self) -> str:
        """The plan as text, on a CPU that for a GPU. Raises SnugError when there is none."""
        units = self.offloading.units(self.model)
        plan = self.offloading.plan(self.model, units)
        if is_dynamic(self):
            return (
                f"ComfyUI pages this model's weights itself (dynamic VRAM); at most {size_text(self._page_limit())} "
                f"of them stay on the GPU."
            )
        others = size_text(other_bytes(self.model, units))
        report = f"{plan.report()} Layers outside of the blocks take {others} more."
        if transfer_to(self.load_device, False, False) is None:
            return f"{report} This device cannot copy and compute at the same time: ComfyUI copies layer by layer."
        return report

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
        try:
            self._load_streamed(device_to, lowvram_model_memory, force_patch_weights, full_load, **options)
        except BaseException as error:
            # Core unloads after errors, of which an interruption is none in newer versions.
            if not isinstance(error, Exception):
                self.detach()
            raise
        return None

    def _load_streamed(
        self,
        device_to: Any,
        lowvram_model_memory: float,
        force_patch_weights: bool,
        full_load: bool,
        **options: Any,
    ) -> None:
        streaming = self.offloading.streaming(self.model)
        if streaming is not None:
            streaming.uninstall()
        units = self.offloading.units(self.model)
        plan = self.offloading.plan(self.model, units)
        layers = {place.module for index in plan.streamed for place in units[index].places}
        mark_streamed(self.model, layers)
        self._unpin_streamed()
        with self._showing(layers, True):
            if any(getattr(layer, "comfy_patched_weights", False) for layer in layers):
                super().partially_unload(self.offload_device, WHOLE)  # another clone has loaded them
            super().load(device_to, 0, force_patch_weights, False, **options)
        slots = self.offloading.stream(self.model, units, plan, self.load_device)
        with self._showing(layers, False):
            memory = WHOLE if full_load else max(lowvram_model_memory - slots, 1)
            super().load(device_to, memory, force_patch_weights, False, **options)
        self._load_loose_parameters(layers)
        self.model.model_lowvram = True
        self.model.model_loaded_weight_memory += slots + self._load_patches(layers)

    def _attach_patches(self, *args: Any) -> None:
        """Patches of packed layers: once, when everything is loaded."""
        if self._shown is None or not self._shown[1]:
            super()._attach_patches(*args)  # type: ignore[misc]

    def _load_patches(self, layers: set[torch.nn.Module]) -> int:
        """LoRA factors of streamed layers that are not packed, on the device where there is room; returns their bytes.

        ComfyUI copies them whenever they are used, which would wait for the groups of weights that are on their way.
        """
        lists = [
            getattr(layer, name, []) for layer in layers for name in ("weight_function", "bias_function")
        ]
        found = [
            (patched, number, function)
            for patched in lists
            for number, function in enumerate(patched)
            if is_low_vram_patch(function) and getattr(function, "set_func", None) is None
        ]
        if found and self.load_device.type != "cpu":
            free = comfy.model_management.get_free_memory(self.load_device)
            needed = sum(adapter_bytes(self.patches[function.key]) for _, _, function in found)
            if needed < free - comfy.model_management.minimum_inference_memory():
                for patched, number, function in found:
                    patches = self.patches[function.key]
                    patched[number] = WeightPatches(function.key, patches, self.load_device)
        functions = (function for patched in lists for function in patched)
        return sum(function.nbytes for function in functions if isinstance(function, WeightPatches))

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
        self.offloading.loaded_by, self.offloading.passes_on = id(self), False
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
        if unpatch_all or not self.offloading.passes_on:
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
            passes_on, self.offloading.passes_on = self.offloading.passes_on, True
            super().__del__()
            self.offloading.passes_on = passes_on

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

    def _unpin_streamed(self) -> None:
        """Those that core has pinned one by one, before they move into the slab: memory that is freed while it is
        pinned stays registered with the driver, and copies from what is allocated there next go wrong.
        """
        for key in list(self.pinned):
            if is_streamed(comfy.utils.get_attr(self.model, key.rpartition(".")[0])):
                self.unpin_weight(key)

    # ---- hooks: patches for a part of the steps or of the conditioning -------------------------------------------

    def patch_hooks(self, hooks: Any) -> None:
        super().patch_hooks(hooks)
        if self.hook_backup:
            self._copy_anew()

    def unpatch_hooks(self, *args: Any, **kwargs: Any) -> None:
        are_patched = bool(self.hook_backup)
        super().unpatch_hooks(*args, **kwargs)
        if are_patched:
            self._copy_anew()

    def _copy_anew(self) -> None:
        """Core has written into weights, in place: what is on the device, or on its way, is out of date."""
        streaming = self.offloading.streaming(self.model)
        if streaming is not None:
            streaming.copy_anew()

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
            pages.set_watermark_limit(
                max(self._page_limit() - self.model.model_loaded_weight_memory, PAGE_BYTES)
            )


@lru_cache
def _offload_class(base: type) -> type:
    return type(f"Offloaded{base.__name__}", (OffloadPatcher, base), {})


def adopt_offloading(patcher: Any) -> Any:
    """Turns a patcher into one that streams; a second one on the same model would register with dynamic VRAM twice."""
    if not isinstance(patcher, OffloadPatcher):
        patcher.__class__ = _offload_class(type(patcher))
    return patcher
