"""The packed weight as ComfyUI sees it: comfy-kitchen's `QuantizedTensor` in the layout "snug.GGML".

`_qdata` holds the block bytes exactly as in the file (uint8, 1-D); the format's name, the logical shape and
the dtype to decode to are plain fields of Params. ggml blocks carry their scales inside, so there are no
further tensors: one contiguous buffer moves, pins and pages as it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class, register_layout_op
from comfy_kitchen.tensor.base import BaseLayoutParams

from ...quant_backends.core.errors import SnugError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.formats import FORMATS
from ...quant_backends.kernels.dequantize import dequantize, quantize
from ...quant_backends.kernels.linear import linear
from ...quant_backends.kernels.traced import traced_dequantize

LAYOUT_NAME = "snug.GGML"


class GGMLLayout(QuantizedLayout):
    """Layout of every ggml block format; which one is `Params.format`."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale is None: ggml blocks hold their own scales. format: a name in the core's FORMATS."""

        format: str

        def _tensor_fields(self) -> list[str]:
            return []

    @classmethod
    def quantize(
        cls, tensor: torch.Tensor, *, format: str, **_core_options: Any
    ) -> tuple[torch.Tensor, GGMLLayout.Params]:
        """Encodes `tensor` in `format`. Core's options (scale, stochastic rounding) have no meaning for ggml.

        Snug's own patcher never needs it. Raises SnugError for formats that cannot be written.
        """
        if not FORMATS[format].can_quantize:
            raise SnugError(
                f"A LoRA cannot be merged into a {format} weight; another node has replaced Snug's handling of "
                f"this model: connect the LoRA without that node, or choose a Q8_0 or Q4_0 file."
            )
        params = cls.Params(None, tensor.dtype, tuple(tensor.shape), format)  # type: ignore[arg-type]
        return quantize(tensor, FORMATS[format]).view(-1), params

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: GGMLLayout.Params) -> torch.Tensor:
        return dequantize(qdata, FORMATS[params.format], params.orig_shape, params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"format": qtensor.params.format}

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: GGMLLayout.Params) -> dict[str, torch.Tensor]:
        return {"": qdata}


def pack(weight: PackedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The core's packed tensor as a comfy-kitchen tensor of its logical shape and `dtype`; no bytes move."""
    params = GGMLLayout.Params(None, dtype, weight.shape, weight.format.name)  # type: ignore[arg-type]
    return QuantizedTensor(weight.data, LAYOUT_NAME, params)


def is_packed(tensor: object) -> TypeGuard[QuantizedTensor]:
    """Whether `tensor` is a weight in Snug's layout."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT_NAME


def with_dtype(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The same packed bytes, decoding to `dtype`."""
    if weight.dtype == dtype:
        return weight
    return QuantizedTensor(weight._qdata, LAYOUT_NAME, dataclasses.replace(weight.params, orig_dtype=dtype))


def unpack(weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight decoded to a plain tensor of `dtype`, rounded once."""
    params = weight.params
    if torch.compiler.is_compiling():
        return traced_dequantize(weight._qdata, params.format, list(params.orig_shape), dtype)
    return dequantize(weight._qdata, FORMATS[params.format], params.orig_shape, dtype)


def unpack_first_block(weight: QuantizedTensor, device: torch.device) -> None:
    """Decodes one block of the weight on `device` and forgets it: puts the format's tables there."""
    fmt = FORMATS[weight.params.format]
    dequantize(weight._qdata[: fmt.block_bytes].to(device), fmt, (fmt.block_size,), weight.dtype)


def packed_linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, calculated in x's dtype; x [..., in], weight [out, in], bias [out] or None."""
    params = weight.params
    return linear(x, weight._qdata, FORMATS[params.format], params.orig_shape, bias)


@register_layout_op(torch.ops.aten.linear.default, GGMLLayout)
def _linear(_first: object, args: Any, kwargs: Any) -> torch.Tensor:
    """Code that calls F.linear with the weight itself gets the same kernel as Snug's own Linear."""
    x, weight, bias, *_ = (*args, kwargs.get("bias"))
    x = unpack(x, x.dtype) if is_packed(x) else x
    if not is_packed(weight):
        return torch.nn.functional.linear(x, weight, bias)
    return packed_linear(x, weight, bias)


register_layout_class(LAYOUT_NAME, GGMLLayout)
