"""The model patcher of models with packed weights.

ComfyUI merges LoRA into weights that are loaded whole, and (dynamic VRAM) quantizes the merged weight again.
For packed weights both are replaced by one rule: after ComfyUI has loaded or moved layers, every packed layer
is given the patches of its key, and applies them when it decodes its weight. Everything else is ComfyUI's own.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy.hooks
import comfy.model_management
import comfy.utils
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...quant_backends.memory.staging import staged_copies
from .compat import is_dynamic, is_low_vram_patch
from .extra_memory import count_extra, extra_bytes, forget_extra
from .layout import is_packed, unpack, warm_up
from .lora_settings import lora_settings
from .offload_units import is_streamed
from .packed_module import PackedWeightModule, packed_modules
from .patches import WeightPatches, adapter_bytes, needs_original
from .side_branch import side_branch
from .state_tensor import PackedStateTensor
from .weight_copies import copies_of, release_copies

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher as _Base
else:
    _Base = object


class _Backup(NamedTuple):
    """Core's record of a weight that it replaced, to be restored on unload."""

    weight: torch.Tensor
    inplace_update: bool


class PackedPatcher(_Base):
    """Mixin before ModelPatcher or ModelPatcherDynamic."""

    def _packed_module(self, key: str) -> PackedWeightModule | None:
        """The layer that a key like "diffusion_model.x.weight" belongs to, if its weight is packed."""
        name, _, attribute = key.rpartition(".")
        if attribute != "weight":
            return None
        module = comfy.utils.get_attr(self.model, name)
        return module if isinstance(module, PackedWeightModule) and is_packed(module.weight) else None

    # ---- LoRA and other weight patches ---------------------------------------------------------------------

    def _attach_patches(self, room: float = 0, on_device: bool = True) -> None:
        """Gives each packed layer the patches of its key and takes away what core has attached instead.

        Safe to call at any time: what a layer already has is kept. room: bytes that patched weights may take decoded;
        on_device: whether low-rank factors may be kept on the device, where they fit.
        """
        settings = lora_settings(self)
        compute_dtype = self.object_patches.get("manual_cast_dtype")
        modules = [(f"{name}.weight", module) for name, module in packed_modules(self.model)]
        on_device = on_device and self._factors_fit(modules)
        for key, module in modules:
            wrappers = self.weight_wrapper_patches.get(key, [])
            module.weight_function = [
                f for f in module.weight_function if not is_low_vram_patch(f) and f not in wrappers
            ]
            if hasattr(module, "weight_lowvram_function"):
                module.weight_lowvram_function = None
            module.weight_wrappers = tuple(wrappers)

            device = self._compute_device(module) if on_device else None
            current = module.weight_patches
            if not self.patches.get(key):
                module.weight_patches = None
                continue
            dtype = compute_dtype or module.weight.dtype
            of_weight = settings.of_weight(key)
            state = (self.patches_uuid, device, of_weight.mode, settings.cache, dtype)
            if current is None or current.state != state:
                patches = self.patches[key]
                branch = side_branch(module, patches, device, dtype, of_weight)
                module.weight_patches = WeightPatches(key, patches, device, branch, state)
        if settings.cache and room > 0:
            self._keep_merged([module for _, module in modules], compute_dtype, room)
        factors = sum(m.weight_patches.nbytes for _, m in modules if m.weight_patches is not None)
        count_extra(self.model, _FACTORS, factors)
        copies = copies_of(self.model)
        if copies is not None:
            copies.drop_out_of_date()
            copies.count()

    def _keep_merged(
        self, modules: list[PackedWeightModule], compute_dtype: torch.dtype | None, room: float
    ) -> None:
        """Keeps weights with costly patches merged and decoded, as long as they fit into `room` bytes.

        Done here and never in a forward: memory that is allocated there and kept breaks CUDA graphs.
        """
        for module in modules:
            patches = module.weight_patches
            device = self.load_device if is_dynamic(self) else module.weight.device
            if patches is None or not patches.costly or patches.kept is not None:
                continue
            if device.type != self.load_device.type:  # it has been offloaded, as memory is short
                continue
            dtype = compute_dtype or module.weight.dtype
            nbytes = module.weight.numel() * dtype.itemsize
            if nbytes <= room:
                patches.kept = patches(unpack(module.weight.to(device), torch.float32)).to(dtype)
                room -= nbytes

    def _room(self, budget: float) -> float:
        """Bytes for what is not needed but useful, beside sampling and the weights; budget: what core would give."""
        free = comfy.model_management.get_free_memory(self.load_device)
        if is_dynamic(self):
            free -= self.model_size() - self.loaded_size()  # pages that are still to come
        return min(free - comfy.model_management.minimum_inference_memory(), budget)

    def _drop_kept(self) -> int:
        """Lets go of the weights that are kept merged; returns the bytes."""
        patches = [module.weight_patches for _, module in packed_modules(self.model)]
        kept = [found for found in patches if found is not None and found.kept is not None]
        nbytes = sum(found.nbytes for found in kept)
        for found in kept:
            found.kept = None
        freed = nbytes - sum(found.nbytes for found in kept)
        count_extra(self.model, _FACTORS, extra_bytes(self.model, _FACTORS) - freed)
        return freed

    def _compute_device(self, module: PackedWeightModule) -> torch.device | None:
        """Where a layer's patches are best kept; None: where ComfyUI has them, copied as they are used.

        With dynamic VRAM the weights themselves stay on the CPU and are paged in; others may be streamed.
        """
        device = self.load_device if is_dynamic(self) or is_streamed(module) else module.weight.device
        return None if device.type == "cpu" else device

    def _factors_fit(self, modules: list[tuple[str, PackedWeightModule]]) -> bool:
        """Whether all low-rank factors fit on the device beside what sampling needs."""
        nbytes = sum(adapter_bytes(self.patches.get(key, [])) for key, _ in modules)
        held = sum(m.weight_patches.nbytes for _, m in modules if m.weight_patches is not None)
        free = comfy.model_management.get_free_memory(self.load_device) + held
        return nbytes < free - comfy.model_management.minimum_inference_memory()

    def load(self, device_to: Any = None, lowvram_model_memory: float = 0, *args: Any, **kwargs: Any) -> Any:
        with staged_copies(device_to):
            result = super().load(device_to, lowvram_model_memory, *args, **kwargs)
        forget_extra(self.model)  # core has counted anew
        # 0: as much as it takes
        budget = lowvram_model_memory - self.model.model_loaded_weight_memory
        self._attach_patches(self._room(budget if lowvram_model_memory else math.inf))
        self._warm_up()
        return result

    def partially_load(self, device_to: Any, extra_memory: float = 0, *args: Any, **kwargs: Any) -> Any:
        """Core does not load again what differs in the way of applying LoRA alone."""
        model = self.model
        copies = copies_of(model)
        if copies is not None:
            copies.reconsider()
        is_whole = model.model_loaded_weight_memory > 0 and not (model.model_lowvram or is_dynamic(self))
        is_loaded = is_whole and model.current_weight_patches_uuid == self.patches_uuid
        result = super().partially_load(device_to, extra_memory, *args, **kwargs)
        if is_loaded:
            self._attach_patches(self._room(extra_memory))
        return result

    def _warm_up(self) -> None:
        """Decodes one block of each format, so that lookup tables are on the device before sampling starts.

        Memory that is allocated in a forward and kept afterwards breaks CUDA graphs.
        """
        weights = {module.weight.params.format: module.weight for _, module in packed_modules(self.model)}
        for weight in weights.values():
            warm_up(weight, self.load_device)

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> Any:
        dropped = release_copies(self.model, memory_to_free)
        if dropped and dropped >= memory_to_free:
            return dropped
        dropped += self._drop_kept()
        if dropped and dropped >= memory_to_free:
            return dropped
        freed = super().partially_unload(device_to, memory_to_free - dropped, *args, **kwargs)
        if not is_dynamic(self):  # there core only drops pages
            self._attach_patches()
        elif self.model.model_loaded_weight_memory == 0:  # or everything: it takes the factors for freed, too
            forget_extra(self.model)
            self._attach_patches(0, False)
        return dropped + freed

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        if unpatch_weights and self.force_cast_weights and not is_dynamic(self):
            # Core takes the mark of offloaded layers away only if there are any. A compute dtype puts it on all, and
            # the next time that layers are offloaded, those that have it are left without their LoRA.
            self.model.model_lowvram = True
        if unpatch_weights:
            release_copies(self.model)
            if (copies := copies_of(self.model)) is not None:
                copies.reconsider()
        result = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for _, module in packed_modules(self.model):
                module.weight_patches = None
                module.weight_wrappers = ()
            forget_extra(self.model)
        return result

    def cleanup(self) -> None:
        """Core calls this after sampling. With dynamic VRAM it asks no model for memory: it takes pages away."""
        if is_dynamic(self):
            release_copies(self.model)
        super().cleanup()

    def patch_weight_to_device(self, key: str, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Core's "merge the patches into this weight now": packed weights stay as they are.

        With return_weight (saving) the merged dense weight is returned; with force_cast (dynamic VRAM, layers
        too small to page) the packed weight is put on the device for good.
        """
        module = self._packed_module(key)
        if module is None:
            return super().patch_weight_to_device(key, device_to, *args, **kwargs)
        if kwargs.get("return_weight"):
            return module.dense_weight()
        if kwargs.get("force_cast"):
            self.backup.setdefault(key, _Backup(module.weight, False))
            comfy.utils.set_attr_param(self.model, key, module.weight.to(device=device_to))
        return None

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """Core's clone may fall back to its plain class (when it leaves dynamic VRAM)."""
        return adopt(super().clone(*args, **kwargs))

    # ---- hooks: patches for a part of the steps or of the conditioning ---------------------------------------

    def patch_hook_weight_to_device(
        self,
        hooks: Any,
        combined_patches: dict[str, Any],
        key: str,
        original_weights: Any,
        memory_counter: Any,
    ) -> None:
        module = self._packed_module(key)
        if module is None:
            super().patch_hook_weight_to_device(
                hooks, combined_patches, key, original_weights, memory_counter
            )
        elif key in combined_patches:
            patches = combined_patches[key]
            originals = {key: original_weights[key]} if needs_original(patches) else None
            device = self._compute_device(module)
            module.hook_patches = WeightPatches(key, patches, device=device, original_weights=originals)
            if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
                self.cached_hook_patches.setdefault(hooks, {})[key] = module.hook_patches

    def patch_cached_hook_weights(
        self, cached_weights: dict[str, Any], key: str, memory_counter: Any
    ) -> None:
        module = self._packed_module(key)
        if module is None:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)
        else:
            module.hook_patches = cached_weights[key]

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for name, module in packed_modules(self.model):
            if not whitelist_keys_set or f"{name}.weight" in whitelist_keys_set:
                module.hook_patches = None
        super().unpatch_hooks(whitelist_keys_set)

    # ---- pinned memory (static mode) and saving --------------------------------------------------------------

    def pin_weight_to_device(self, key: str) -> None:
        weight = comfy.utils.get_attr(self.model, key)
        if not is_packed(weight) or is_streamed(comfy.utils.get_attr(self.model, key.rpartition(".")[0])):
            super().pin_weight_to_device(key)  # which leaves out what is streamed
        elif comfy.model_management.pin_memory(_codes(weight)):
            self.pinned.add(key)

    def unpin_weight(self, key: str) -> None:
        weight = comfy.utils.get_attr(self.model, key)
        if not is_packed(weight):
            super().unpin_weight(key)
        elif key in self.pinned:
            comfy.model_management.unpin_memory(_codes(weight))
            self.pinned.remove(key)

    def model_state_dict_for_saving(
        self, model: torch.nn.Module | None = None, prefix: str = ""
    ) -> dict[str, Any]:
        """Newer ComfyUI saves core's own packings; Snug's packed weights are saved dense, decoded one by one."""
        state_dict = super().model_state_dict_for_saving(model, prefix)
        for name, module in packed_modules(self.model if model is None else model):
            state_dict[f"{name}.weight"] = PackedStateTensor(module)
        return state_dict


# What low-rank factors and weights that are kept merged are counted as.
_FACTORS = "factors"


def _codes(weight: QuantizedTensor) -> torch.nn.Parameter:
    """The packed bytes as core's pinning accepts them; ComfyUI 0.3.75 would pin the dense size otherwise.

    Scales beside them are small and often share a page, which can be pinned only once.
    """
    return torch.nn.Parameter(weight._qdata, requires_grad=False)


@lru_cache
def _packed_class(base: type) -> type:
    return type(f"Snug{base.__name__}", (PackedPatcher, base), {})


def adopt(patcher: Any) -> Any:
    """Turns a patcher that ComfyUI has just made into one for packed weights.

    The class is exchanged, as a second patcher on the same model would register with dynamic VRAM twice.
    """
    if not isinstance(patcher, PackedPatcher):
        patcher.__class__ = _packed_class(type(patcher))
    # On the CPU, ComfyUI 0.3.75 counts a text encoder as loaded, and keeps its size, before it has weights.
    patcher.size = 0
    if getattr(patcher.model, "model_loaded_weight_memory", 0):
        patcher.model.model_loaded_weight_memory = patcher.model_size()
    return patcher
