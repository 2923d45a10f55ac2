"""The experts of a mixture (GPT-OSS) as one of ComfyUI's operations, their weights packed in one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F

from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.formats.plain import HALVES
from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.kernels.linear import linear
from ...quant_backends.readers.packed_rows import cut_packed
from .layout import is_packed, pack, packed_tensor
from .packed_module import PackedWeightModule


class PackedExperts(PackedWeightModule, comfy.ops.CastWeightBiasOp):
    """What ComfyUI calls MoEExperts: linear layers of one shape, weight [experts, out, in], bias [experts, out].

    A packed weight is decoded expert by expert, and only those that tokens were sent to.
    """

    comfy_cast_weights = True
    _resident_bank: tuple[Any, torch.Tensor | None] | None = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.factory_kwargs = {"device": device, "dtype": dtype}
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(num_experts, out_features, **self.factory_kwargs))

    @contextmanager
    def bank_resident(self, input: torch.Tensor) -> Iterator[PackedExperts]:
        """Moves all experts to input's device, for the calls of `expert_linear` inside."""
        with self.cast_weight(input) as (weight, bias):
            if not is_packed(weight) or self.patched():
                weight = self.weight_for(input, weight)
            self._resident_bank = (weight, bias)
            try:
                yield self
            finally:
                self._resident_bank = None

    def expert_linear(self, input: torch.Tensor, i: int) -> torch.Tensor:
        """input [tokens, in] through expert i: [tokens, out]."""
        if self._resident_bank is None:
            with self.bank_resident(input):
                return self.expert_linear(input, i)
        weight, bias = self._resident_bank
        offset = None if bias is None else bias[i].to(input.dtype)
        if not is_packed(weight):
            return F.linear(input, weight[i], offset)
        expert = _expert(packed_tensor(weight), i, input.dtype)
        if isinstance(expert, PackedTensor):
            return linear(input, expert, offset)
        return F.linear(input, expert, offset)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.num_experts, self.out_features, self.in_features)

    def _load_dense(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes over plain tensors as they are, mapped from the file."""
        _, _, missing_keys, _, errors = rest
        shapes = {"weight": self._weight_shape(), "bias": None if self.bias is None else self.bias.shape}
        for name, shape in shapes.items():
            key, value = prefix + name, state_dict.get(prefix + name)
            if shape is None:
                continue
            if value is None:
                missing_keys.append(key)
                if getattr(self, name) is None:
                    self.weight = torch.nn.Parameter(
                        torch.zeros(shape, **self.factory_kwargs), requires_grad=False
                    )
            elif tuple(value.shape) != tuple(shape):
                errors.append(
                    f"size mismatch for {key}: the file has {tuple(value.shape)}, the model needs {tuple(shape)}."
                )
            elif name == "weight" and value.dtype in HALVES:
                data = value.contiguous().view(-1).view(torch.uint8)
                packed = PackedTensor(data, HALVES[value.dtype], tuple(shape))
                self.take_weight(pack(packed, self.factory_kwargs["dtype"]), errors, key, tuple(shape))
            else:
                dtype = self.factory_kwargs["dtype"]
                setattr(self, name, torch.nn.Parameter(value.to(dtype), requires_grad=False))


def _expert(bank: PackedTensor, number: int, dtype: torch.dtype) -> PackedTensor | torch.Tensor:
    """The weight of one expert, still packed where its format says nothing of rows, else decoded to `dtype`."""
    cut = cut_packed(bank, number, number + 1)
    if cut is None:  # a block crosses experts
        return dequantize_packed(bank, dtype)[number]
    if isinstance(cut.format, type):
        return PackedTensor(cut.data, cut.format, cut.shape[1:])
    return dequantize_packed(cut, dtype)[0]
