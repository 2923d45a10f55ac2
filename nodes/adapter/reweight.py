"""A MODEL or CLIP with other weights in its layers, beside the one that it was made from.

The new patcher stands on a copy of the model in which some layers hold a weight of another format; what did not change
is shared. LoRA and everything else that nodes have added is carried over, so that the order of nodes does not matter.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from inspect import getclosurevars, isfunction
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import (
    COMPILE_KEY,
    TORCH_COMPILE_KWARGS,
    set_torch_compile_wrapper,
)

from ...quant_backends.core.packed import PackedTensor
from .compat import is_dynamic
from .layout import pack
from .loading import ignore
from .model_copy import ModelCopy
from .operations import build_operations
from .packed_module import LoadSettings, PackedWeightModule, set_compute_dtype
from .patcher import adopt

# (name in the model, layer) -> its new weight of the same shape, or None to keep the one that it has.
ChooseWeight = Callable[[str, torch.nn.Module], PackedTensor | torch.Tensor | None]

# The operations whose weight may be packed, by the names that ComfyUI gives their classes.
LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MoEExperts")


def reweight(patcher: Any, choose: ChooseWeight, compute_dtype: torch.dtype | None = None) -> Any:
    """A patcher of its own whose layers have the weights that `choose` returns.

    patcher: a ModelPatcher of any kind; it is unloaded, so that no LoRA is in its weights, and not changed otherwise.
    choose: called once for each layer that can hold a packed weight, tied ones once together; it may raise.
    compute_dtype: what the new model calculates in; None: what the old one does.
    Shows progress, and stops when the user cancels.
    """
    unload(patcher.model, patcher)
    copied = ModelCopy(patcher.model)
    layers = list(replaceable_layers(copied.model))
    dtype = compute_dtype or _decoding_dtype(patcher)
    operations = build_operations(LoadSettings(on_weight=ignore))
    bar = comfy.utils.ProgressBar(sum(_cost(layer) for _, layer in layers))
    tied: dict[
        int, torch.nn.Parameter
    ] = {}  # by the old one's id, which stays its own: the copy holds on to it
    for name, layer in layers:
        comfy.model_management.throw_exception_if_processing_interrupted()
        cost, old = _cost(layer), layer.weight
        if id(old) not in tied:
            weight = choose(name, layer)
            if isinstance(weight, PackedTensor):
                weight = pack(weight, dtype)
            if weight is not None:
                tied[id(old)] = torch.nn.Parameter(weight, requires_grad=False)
        if id(old) in tied:
            _set_weight(layer, tied[id(old)], getattr(operations, type(layer).__name__))
        bar.update(cost)
    new = _patcher_over(patcher, copied)
    if compute_dtype is not None:
        new.set_model_compute_dtype(compute_dtype)
        set_compute_dtype(new.model, compute_dtype)
    return new


def reweight_clip(clip: Any, choose: ChooseWeight) -> Any:
    """The same for a CLIP."""
    new = clip.clone()
    new.patcher = reweight(clip.patcher, choose)
    new.cond_stage_model = new.patcher.model
    return new


def replaceable_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with a weight that may be packed: ComfyUI's own operations and Snug's.

    Layers that models or other packs derive from them are left out, as they may use the weight in their own way.
    """
    for name, module in model.named_modules():
        kind = type(module)
        known = kind.__module__ == comfy.ops.__name__ or isinstance(module, PackedWeightModule)
        if not known or kind.__name__ not in LAYERS or getattr(module, "weight", None) is None:
            continue
        if getattr(module, "pre_quant_scale", None) is None:  # a factor of core's quantized layers
            yield name, module


def unload(model: torch.nn.Module, patcher: Any = None) -> None:
    """Takes the model off its device, so that its weights are its own again: no LoRA merged, nothing moved.

    patcher: one of the model's, for what was loaded behind the back of ComfyUI's memory management.
    """
    management = comfy.model_management
    loaded = [entry for entry in management.current_loaded_models if entry.model is not None]
    own = [entry for entry in loaded if entry.model.model is model]
    others = [entry for entry in loaded if entry.model.model is not model]
    for device in {entry.device for entry in own}:
        management.free_memory(1e30, device, keep_loaded=others)
    if patcher is not None and model.current_weight_patches_uuid is not None:
        patcher.detach()


def rebuild(
    model: torch.nn.Module,
    load_device: torch.device,
    offload_device: torch.device,
    dynamic: bool,
    disable_dynamic: bool = False,
) -> Any:
    """Newer ComfyUI asks for the model anew when it must not use dynamic VRAM, or for another GPU: one more copy.

    dynamic: whether `model` is used with dynamic VRAM.
    """
    unload(model)
    use_dynamic = dynamic and not disable_dynamic
    kind = comfy.model_patcher.CoreModelPatcher if use_dynamic else comfy.model_patcher.ModelPatcher
    patcher = adopt(kind(ModelCopy(model).model, load_device, offload_device))
    patcher.cached_patcher_init = (rebuild, (model, load_device, offload_device, dynamic))
    return patcher


def _cost(layer: torch.nn.Module) -> int:
    """What a layer counts for progress."""
    return layer.weight.numel()  # type: ignore[union-attr]


def _set_weight(layer: Any, weight: torch.nn.Parameter, operation: type) -> None:
    """Makes the layer one of Snug's in place: parents and others refer to it in their own ways."""
    if not isinstance(layer, operation):
        layer.__dict__.pop("comfy_cast_weights", None)
        layer.__class__ = operation
    layer._parameters.pop("weight")
    layer.weight = weight
    if issubclass(operation, torch.nn.Linear):
        bias = layer.bias
        layer.comfy_need_lazy_init_bias = bias is not None
        layer.__dict__.setdefault("bias_comfy_model_dtype", None if bias is None else bias.dtype)
    layer.weight_comfy_model_dtype = weight.dtype


def _decoding_dtype(patcher: Any) -> torch.dtype:
    """What the model calculates in; ComfyUI's text encoders do so in float32."""
    model = patcher.model
    dtype = patcher.object_patches.get("manual_cast_dtype") or getattr(model, "manual_cast_dtype", None)
    return dtype or (model.get_dtype() if hasattr(model, "get_dtype") else torch.float32)


def _patcher_over(patcher: Any, copied: ModelCopy) -> Any:
    """A clone of the patcher on the copied model, as if it had been loaded with it."""
    if hasattr(patcher, "get_clone_model_override"):
        backups = (type(backup)() for backup in patcher.get_clone_model_override()[1])
        new = patcher.clone(model_override=(copied.model, tuple(backups)))
        new.clone_base_uuid = uuid.uuid4()
    else:
        new = patcher.clone()
        new.model = copied.model
        new.backup, new.object_patches_backup, new.pinned = {}, {}, set()
    new.size = 0
    new.parent = None  # ComfyUI would unload the other model in its place
    new.hook_backup, new.cached_hook_patches, new.current_hooks = {}, {}, None
    new.is_injected = False
    new.additional_models.pop("multigpu", None)  # the other model on other GPUs
    new.object_patches = {name: copied.counterpart(value) for name, value in new.object_patches.items()}
    _renew_injections(new)
    _renew_compilation(new)
    adopt(new)
    new.cached_patcher_init = (rebuild, (new.model, new.load_device, new.offload_device, is_dynamic(new)))
    return new


def _renew_injections(patcher: Any) -> None:
    """LoRA in ComfyUI's bypass mode holds on to the layers that it was made for."""
    for injections in patcher.injections.values():
        for number, injection in enumerate(injections):
            manager = _captured(injection.inject, "self")
            if type(manager).__name__ == "BypassInjectionManager":
                twin = type(manager)()
                twin.adapters = dict(manager.adapters)
                injections[number : number + 1] = twin.create_injections(patcher.model)


def _renew_compilation(patcher: Any) -> None:
    """ComfyUI's torch.compile holds on to the modules that it has compiled."""
    for wrapper in patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY):
        modules = _captured(wrapper, "compiled_module_dict")
        if modules:
            set_torch_compile_wrapper(
                patcher, keys=list(modules), **patcher.model_options[TORCH_COMPILE_KWARGS]
            )


def _captured(function: Any, name: str) -> Any:
    """The variable that a function inside another one took along; None when there is none."""
    return getclosurevars(function).nonlocals.get(name) if isfunction(function) else None
