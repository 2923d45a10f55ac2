"""A second model over the same weights: every module is new, every tensor is shared.

`copy.deepcopy` would copy the weights, and cannot copy the models of newer ComfyUI at all.
"""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import Any

import torch

# What ComfyUI and Snug attach to modules while a model is loaded: it belongs to that loading alone.
_OF_LOADING = {
    "comfy_patched_weights",
    "comfy_force_cast_weights",
    "prev_comfy_cast_weights",
    "weight_function",
    "bias_function",
    "weight_lowvram_function",
    "bias_lowvram_function",
    "weight_patches",
    "hook_patches",
    "weight_wrappers",
    "weight_copy",
    "product",
    "snug_extra_bytes",
    "snug_weight_copies",
    "snug_is_streamed",
    "snug_streamed_unit",
    "dynamic_vbars",
    "dynamic_pins",
    "dynamic_patchers",
    "_v",
    "_pins",
    "_pin_state",
    "_prefetch",
    "_comfy_graph",
    "_comfy_cross_step_state",
    "_compiled_call_impl",
}
# What a model says of itself before it is loaded; core sets it when the first patcher is built.
_UNLOADED = {
    "model_loaded_weight_memory": 0,
    "model_offload_buffer_memory": 0,
    "lowvram_patch_counter": 0,
    "model_lowvram": False,
    "current_weight_patches_uuid": None,
}


class ModelCopy:
    """model: the copy of an unloaded model.

    Attributes that refer to modules of the model, also in containers and as bound methods, refer to the copies.
    """

    def __init__(self, original: torch.nn.Module) -> None:
        self._inside = {id(module) for module in original.modules()}
        self._copies: dict[int, Any] = {}
        self.model = self._module(original)
        self.model.__dict__.update(_UNLOADED)
        if hasattr(original, "current_patcher"):
            self.model.__dict__["current_patcher"] = None

    def counterpart(self, value: Any) -> Any:
        """`value` with modules of the original replaced by their copies; what has none in it is shared."""
        if isinstance(value, torch.nn.Module):
            return self._module(value) if id(value) in self._inside else value
        if isinstance(value, torch.nn.Parameter):
            return self._parameter(value)
        kind: Any = type(value)
        if kind in (dict, OrderedDict):
            return kind((key, self.counterpart(item)) for key, item in value.items())
        if kind in (list, tuple, set):
            return kind(self.counterpart(item) for item in value)
        if isinstance(value, MethodType) and id(value.__self__) in self._inside:
            return MethodType(value.__func__, self._module(value.__self__))
        return value

    def _module(self, module: Any) -> Any:
        if id(module) not in self._copies:
            kind: Any = type(module)
            twin = self._copies[id(module)] = kind.__new__(kind)
            state = {name: value for name, value in module.__dict__.items() if not _is_of_loading(name)}
            if "prev_comfy_cast_weights" in module.__dict__:
                state["comfy_cast_weights"] = module.prev_comfy_cast_weights
            for name, value in state.items():
                twin.__dict__[name] = self.counterpart(value)
        return self._copies[id(module)]

    def _parameter(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """A parameter of its own, as core moves weights by exchanging what is inside; tied ones stay tied."""
        if id(parameter) not in self._copies:
            twin = torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
            self._copies[id(parameter)] = twin
        return self._copies[id(parameter)]


def _is_of_loading(name: str) -> bool:
    return name in _OF_LOADING or name.startswith("_v_")
