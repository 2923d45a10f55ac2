"""ComfyUI's operations (the layer classes that models are built from) with packed weights.

A new class is built for each load, so settings of one model never reach another that is already loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.formats.plain import HALVES
from ...quant_backends.kernels.embedding import embedding
from .experts import PackedExperts
from .layout import is_packed, pack, packed_linear, packed_tensor, unpack
from .packed_module import LoadSettings, PackedWeightModule
from .side_branch import SideBranch


def build_operations(load_settings: LoadSettings) -> type[comfy.ops.manual_cast]:
    """The operations class to pass to ComfyUI as `custom_operations` for one load."""

    class SnugOperations(comfy.ops.manual_cast):
        class Linear(PackedLinear):
            settings = load_settings

        class Conv1d(PackedConv, comfy.ops.manual_cast.Conv1d):
            settings = load_settings

        class Conv2d(PackedConv, comfy.ops.manual_cast.Conv2d):
            settings = load_settings

        class Conv3d(PackedConv, comfy.ops.manual_cast.Conv3d):
            settings = load_settings

        class Embedding(PackedEmbedding):
            settings = load_settings

        class MoEExperts(PackedExperts):
            settings = load_settings

        class GroupNorm(DenseOnLoad, comfy.ops.manual_cast.GroupNorm):
            pass

        class LayerNorm(DenseOnLoad, comfy.ops.manual_cast.LayerNorm):
            pass

        class RMSNorm(DenseOnLoad, comfy.ops.manual_cast.RMSNorm):
            pass

        class ConvTranspose1d(DenseOnLoad, comfy.ops.manual_cast.ConvTranspose1d):
            pass

        class ConvTranspose2d(DenseOnLoad, comfy.ops.manual_cast.ConvTranspose2d):
            pass

    return SnugOperations


class PackedLinear(PackedWeightModule, comfy.ops.manual_cast.Linear):
    """Linear that never allocates its dense weight: torch would reserve the whole model at construction.

    product: another way to multiply, for the time of a call: (layer, input, its packed weight, its bias) -> output, or
    None to multiply as usual.
    """

    product: Callable[[PackedLinear, torch.Tensor, Any, torch.Tensor | None], torch.Tensor | None] | None = (
        None
    )

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        torch.nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        # Names that core reads when it pages weights (dynamic VRAM).
        self.comfy_need_lazy_init_bias = bias
        self.weight_comfy_model_dtype = dtype
        self.bias_comfy_model_dtype = dtype

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def _load_dense(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes over plain tensors as they are, mapped from the file; copies only to change the dtype."""
        local_metadata, _, missing_keys, unexpected_keys, error_msgs = rest
        shapes = {"weight": self._weight_shape()}
        if self.comfy_need_lazy_init_bias:
            shapes["bias"] = (self.out_features,)
        for name, shape in shapes.items():
            key = prefix + name
            value = state_dict.get(key)
            dtype = getattr(self, f"{name}_comfy_model_dtype")
            if value is None:
                missing_keys.append(key)
                if getattr(self, name) is not None:
                    continue
                value = torch.zeros(shape, dtype=dtype)
            elif tuple(value.shape) != shape:
                error_msgs.append(
                    f"size mismatch for {key}: the file has {tuple(value.shape)}, the model needs {shape}."
                )
                continue
            elif name == "weight" and _is_half_of(value.dtype, dtype):
                # A float32 copy (on a CPU) would take three times the memory of the mapped file.
                data = value.contiguous().view(-1).view(torch.uint8)
                weight = pack(PackedTensor(data, HALVES[value.dtype], shape), dtype)
                self.take_weight(weight, error_msgs, key, shape)
                continue
            elif name == "bias" or not local_metadata.get("assign_to_params_buffers", False):
                # A bias in another dtype than the model's would make core cast the packed weight with it.
                value = value.to(dtype)
            setattr(self, name, torch.nn.Parameter(value, requires_grad=False))
        known = {prefix + name for name in shapes}
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        with self.cast_weight(input) as (weight, bias):
            if not is_packed(weight):
                return F.linear(input, self.weight_for(input, weight), bias)
            if self.product is not None:
                output = self.product(self, input, weight, bias)
                if output is not None:
                    return output
            branch = self.branch_for(input)
            if branch is not None:
                return branch.add_to(self._unpatched(input, weight, bias), input)
            if self.patched():
                return F.linear(input, self.weight_for(input, weight), bias)
            return self._unpatched(input, weight, bias)

    def _unpatched(self, input: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer without its LoRA."""
        copy = self.weight_copy
        dense = None if copy is None else copy.merged(None, input.dtype)
        if dense is None or input.requires_grad:
            return packed_linear(input, weight, bias)
        return F.linear(input, dense, bias)

    def branch_for(self, input: torch.Tensor) -> SideBranch | None:
        """The patches as a branch beside the weight, if this call is to take it and nothing else is to be merged."""
        branch = self._only_branch()
        return branch if branch is not None and branch.applies(input) else None


def _is_half_of(stored: torch.dtype, wanted: torch.dtype | None) -> bool:
    return stored in HALVES and wanted is not None and stored.itemsize < wanted.itemsize


class PackedConv(PackedWeightModule):
    """Mixin for Conv1d, Conv2d and Conv3d: decodes the kernel, then ComfyUI's own convolution."""

    _conv_forward: Any

    def forward_comfy_cast_weights(self, input: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        with self.cast_weight(input) as (weight, bias):
            return self._conv_forward(input, self.weight_for(input, weight), bias, *args, **options)


class PackedEmbedding(PackedWeightModule, comfy.ops.manual_cast.Embedding):
    """Embedding table; of a packed one only the rows that are looked up are moved and decoded."""

    def forward_comfy_cast_weights(
        self, input: torch.Tensor, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if not is_packed(self.weight):
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
        dtype = self.weight.dtype if out_dtype is None else out_dtype
        if not (self.patched() or self.weight_function or self.max_norm):
            rows = embedding(input, packed_tensor(self.weight), dtype)
            if rows is not None:
                return rows
        with self.cast_weight(None, device=input.device, dtype=dtype) as (weight, _):
            return F.embedding(
                input,
                self.dense_weight(weight, dtype),
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )


class DenseOnLoad(torch.nn.Module):
    """Mixin for layers whose weights are small: a packed tensor is decoded once, when it is loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        dense = {
            key: unpack(value, torch.float32) if key.startswith(prefix) and is_packed(value) else value
            for key, value in state_dict.items()
        }
        super()._load_from_state_dict(dense, prefix, *args)
