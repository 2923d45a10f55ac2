"""What every layer with a packed weight shares: loading it, moving it, patching it, showing it to ComfyUI."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from .layout import is_packed, moved, pack, packed_tensor, stored_nbytes, unpack, with_dtype
from .patches import WeightPatches
from .side_branch import SideBranch
from .state_tensor import PackedStateTensor
from .weight_copies import WeightCopy


@dataclass
class LoadSettings:
    """What the layers of one model share. One instance per load, so that two models never affect each other.

    on_weight: called with the bytes of each weight as it is taken over, for progress.
    """

    on_weight: Callable[[int], None]


class PackedWeightModule(torch.nn.Module):
    """Mixin before one of ComfyUI's operation classes; its `weight` may be a packed tensor.

    weight_patches, hook_patches, weight_wrappers: what is applied to the packed weight, in this order, whenever
    it is decoded; set by the model patcher. (ComfyUI's own `weight_function` would make core copy the weight
    and hand it over decoded in the compute dtype, or in older versions packed.)
    weight_copy: what would be worked out of the weight in each call, where there was memory to keep it.
    """

    settings: LoadSettings
    weight: Any
    bias: Any
    weight_function: list[Any]
    weight_lowvram_function: Any
    weight_patches: WeightPatches | None = None
    hook_patches: WeightPatches | None = None
    weight_wrappers: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
    weight_copy: WeightCopy | None = None

    # ---- the weight, decoded -------------------------------------------------------------------------------

    def patched(self) -> bool:
        return bool(self.weight_patches or self.hook_patches or self.weight_wrappers)

    def dense_weight(self, weight: Any = None, dtype: Any = None) -> torch.Tensor:
        """The decoded and patched weight, in `dtype` (default: the weight's own), rounded once.

        weight: where the bytes are now, when ComfyUI has just moved them; default the module's own.
        The result is the caller's own wherever a patch is on it.
        """
        weight = self.weight if weight is None else weight
        dtype = dtype or weight.dtype
        kept = self._kept_weight(dtype)
        if kept is not None:
            return kept.to(weight.device, copy=True)
        if not self.patched():
            return unpack(weight, dtype) if is_packed(weight) else weight.to(dtype)
        branch = self._only_branch()
        if branch is not None and is_packed(weight) and not torch.compiler.is_compiling():
            return branch.decode_with(packed_tensor(weight), dtype)
        # Newer ComfyUI hands some weights over decoded in the compute dtype; patches change what they are given.
        dense = unpack(weight, torch.float32) if is_packed(weight) else weight.to(torch.float32, copy=True)
        for function in (self.weight_patches, self.hook_patches, *self.weight_wrappers):
            if function is not None:
                dense = function(dense)
        return dense.to(dtype)

    def weight_for(self, input: torch.Tensor, weight: Any) -> torch.Tensor:
        """The same on input's device and in its dtype, to be read only: what is kept in memory is not copied."""
        kept = self._kept_weight(input.dtype)
        return self.dense_weight(weight, input.dtype) if kept is None else kept.to(input.device)

    def _only_branch(self) -> SideBranch | None:
        """The weight's patches as two factors, if they are all that is to be applied to it."""
        if self.weight_patches is None or self.hook_patches or self.weight_wrappers:
            return None
        return self.weight_patches.branch

    def _kept_weight(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The patched weight that is kept decoded, if nothing else is to be applied to it."""
        if self.changed_for_a_while():
            return None
        patches = self.weight_patches
        kept = None if patches is None else patches.kept
        if kept is not None and kept.dtype == dtype:
            return kept
        return None if self.weight_copy is None else self.weight_copy.merged(patches, dtype)

    def changed_for_a_while(self) -> bool:
        """Whether anything but the LoRA of the model is applied to the weight."""
        return bool(self.hook_patches or self.weight_wrappers or self.weight_function)

    @contextmanager
    def cast_weight(
        self, input: torch.Tensor | None, **options: Any
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight (packed where it is) and bias on input's device, given back to ComfyUI afterwards whatever happens."""
        if input is not None and is_packed(self.weight):
            # Input's dtype would make newer core decode the weight: too early, patches are added in float32.
            options = {"dtype": self.weight.dtype, "bias_dtype": input.dtype, **options}
        weight, bias, token = comfy.ops.cast_bias_weight(self, input, offloadable=True, **options)
        try:
            yield weight, bias
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, token)

    # ---- ComfyUI's weight patching contract ----------------------------------------------------------------

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_: Any) -> torch.Tensor:
        """For core's merges: the weight that core hands in, as a plain tensor to calculate on."""
        return unpack(weight, weight.dtype) if is_packed(weight) else weight

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
    ) -> torch.Tensor | None:
        """For patchers other than Snug's: takes the merged weight as it is, dense; it is not quantized again."""
        weight = weight.to(self.weight.dtype)
        if return_weight:
            return weight
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        return None

    # ---- torch.nn.Module -----------------------------------------------------------------------------------

    def take_weight(
        self, weight: QuantizedTensor, errors: list[str], name: str, shape: tuple[int, ...]
    ) -> None:
        """Makes a packed tensor the weight, without copying it; a wrong shape is added to `errors`."""
        if tuple(weight.shape) != shape:
            errors.append(
                f"size mismatch for {name}: the file has {tuple(weight.shape)}, the model needs {shape}."
            )
            return
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.settings.on_weight(stored_nbytes(weight))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """rest, as torch passes it: local metadata, strict, missing keys, unexpected keys, error messages."""
        key = prefix + "weight"
        weight = state_dict.get(key)
        if isinstance(weight, PackedStateTensor):
            weight = weight.module.weight
        if not is_packed(weight):
            self._load_dense(state_dict, prefix, *rest)
            return
        _, _, missing_keys, _, errors = rest
        shape = self._weight_shape()
        self.weight = None
        # First, so that no dense weight is made in its place.
        self.take_weight(weight, errors, key, shape)
        self._load_dense({name: value for name, value in state_dict.items() if name != key}, prefix, *rest)
        if key in missing_keys:
            missing_keys.remove(key)

    def _load_dense(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _weight_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_packed(self.weight):
            destination[prefix + "weight"] = PackedStateTensor(self)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedWeightModule:
        """`.to()`, `.cuda()` and the like. torch would set `.data`, which leaves the bytes inside behind."""
        weight = self.weight
        if not is_packed(weight):
            return super()._apply(fn, recurse)
        self._parameters["weight"] = None
        super()._apply(fn, recurse)
        # ComfyUI loads and runs models in inference mode but unloads them outside of it, when somebody asks for that.
        # A weight that began inside must be moved inside: torch refuses to use any other one there.
        with torch.inference_mode() if weight.is_inference() else contextlib.nullcontext():
            device = fn(torch.empty(0)).device
            if device != weight.device:
                weight = pack(moved(packed_tensor(weight), device), weight.dtype)
            self.weight = torch.nn.Parameter(fn(weight), requires_grad=False)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeightModule:
        """comfy-kitchen's tensors cannot be deep-copied: the packed weight is cloned instead."""
        if is_packed(self.weight):
            memo[id(self.weight)] = torch.nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        for function in (self.weight_patches, self.hook_patches, *self.weight_wrappers):
            if function is not None:
                memo[id(function)] = function  # never changed, and they may hold another model's weights
        memo[id(self.weight_copy)] = None  # a copied model makes its own
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def packed_modules(model: torch.nn.Module) -> Iterator[tuple[str, PackedWeightModule]]:
    """(name, module) of every layer of `model` whose weight is packed."""
    for name, module in model.named_modules():
        if isinstance(module, PackedWeightModule) and is_packed(module.weight):
            yield name, module


def set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Lets every packed weight decode to `dtype`, so that core hands it to the kernels still packed."""
    for _, module in packed_modules(model):
        module.weight = torch.nn.Parameter(with_dtype(module.weight, dtype), requires_grad=False)
