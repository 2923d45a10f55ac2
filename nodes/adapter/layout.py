"""The packed weight as ComfyUI sees it: comfy-kitchen's `QuantizedTensor` in the layout "snug.Packed".

`_qdata` holds the codes exactly as in the file. Params holds the rest as plain fields: the format's name, the
logical shape, the dtype to decode to, and what lies beside the codes (scales and the like). ggml blocks carry
their scales inside, so there `_qdata` is the whole weight.
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
from ...quant_backends.formats.scaled import format_called
from ...quant_backends.kernels.dequantize import dequantize, dequantize_packed, quantize
from ...quant_backends.kernels.linear import linear
from ...quant_backends.kernels.traced import traced_dequantize
from ...quant_backends.memory.staging import staged

LAYOUT_NAME = "snug.Packed"
# What weights are in that are not quantized.
DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of each format, decoded before a model is used.
_WARM_UP_BLOCKS = 80
# Every name that a scaled format gives to one of its parts.
PART_NAMES = (
    "scale",
    "zero",
    "shift",
    "factor",
    "step",
    "offset",
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "nested_offset",
)


class PackedLayout(QuantizedLayout):
    """Layout of every format that Snug reads; which one is `Params.format`."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """format: a name for `format_called`. The tensors are the parts of a PackedTensor, None where the format has
        no such part: one field for each of PART_NAMES (`scale` is the base's).
        """

        scale: torch.Tensor | None
        format: str
        zero: torch.Tensor | None = None
        shift: torch.Tensor | None = None
        factor: torch.Tensor | None = None
        step: torch.Tensor | None = None
        offset: torch.Tensor | None = None
        absmax: torch.Tensor | None = None
        quant_map: torch.Tensor | None = None
        nested_absmax: torch.Tensor | None = None
        nested_quant_map: torch.Tensor | None = None
        nested_offset: torch.Tensor | None = None

        @property
        def parts(self) -> dict[str, torch.Tensor]:
            found = {name: getattr(self, name) for name in PART_NAMES}
            return {name: part for name, part in found.items() if part is not None}

        def _tensor_fields(self) -> list[str]:
            return list(self.parts)

        def clone(self) -> PackedLayout.Params:
            """Shares the tensors: comfy-kitchen clones for every `detach()`, so that making a weight a parameter
            would copy its scales out of the mapped file. Nothing writes to them but `copy_from`.
            """
            twin = dataclasses.replace(self)
            twin.__dict__["_shares"] = True
            return twin

        def copy_from(self, src: BaseLayoutParams, non_blocking: bool = False) -> None:
            if self.__dict__.pop("_shares", False):  # what another weight uses must not be overwritten
                for name, part in self.parts.items():
                    object.__setattr__(self, name, torch.empty_like(part))
            super().copy_from(src, non_blocking)

    @classmethod
    def quantize(
        cls, tensor: torch.Tensor, *, format: str, **_core_options: Any
    ) -> tuple[torch.Tensor, PackedLayout.Params]:
        """Encodes `tensor` in a ggml format. Core's options (scale, stochastic rounding) have no meaning there.

        Snug's own patcher never needs it. Raises SnugError for formats that cannot be written.
        """
        fmt = FORMATS.get(format)
        if fmt is None or not fmt.can_quantize:
            raise SnugError(
                f"A LoRA cannot be merged into a {format} weight; another node has replaced Snug's handling of "
                f"this model: connect the LoRA without that node, or choose a Q8_0 or Q4_0 file."
            )
        params = cls.Params(None, tensor.dtype, tuple(tensor.shape), format)
        return quantize(tensor, fmt).view(-1), params

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: PackedLayout.Params) -> torch.Tensor:
        return dequantize_packed(_packed(qdata, params), params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"format": qtensor.params.format}

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata, *qtensor.params.parts.values())

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: PackedLayout.Params) -> dict[str, torch.Tensor]:
        return {"": qdata, **{f".{name}": part for name, part in params.parts.items()}}


def _packed(qdata: torch.Tensor, params: PackedLayout.Params) -> PackedTensor:
    return PackedTensor(qdata, format_called(params.format), tuple(params.orig_shape), params.parts)


def pack(weight: PackedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The core's packed tensor as a comfy-kitchen tensor of its logical shape and `dtype`; no bytes move."""
    parts = {"scale": None, **weight.parts}
    params = PackedLayout.Params(
        orig_dtype=dtype, orig_shape=weight.shape, format=weight.format.name, **parts
    )
    return QuantizedTensor(weight.data, LAYOUT_NAME, params)


def packed_tensor(weight: QuantizedTensor) -> PackedTensor:
    """The core's view of a packed weight, wherever its bytes are now."""
    return _packed(weight._qdata, weight.params)


def moved(packed: PackedTensor, device: torch.device) -> PackedTensor:
    """The same weight on `device`."""
    parts = {name: staged(part, device) for name, part in packed.parts.items()}
    return PackedTensor(staged(packed.data, device), packed.format, packed.shape, parts)


def is_packed(tensor: object) -> TypeGuard[QuantizedTensor]:
    """Whether `tensor` is a weight in Snug's layout."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT_NAME


def stored_nbytes(weight: QuantizedTensor) -> int:
    """Bytes of a packed weight, scales included (comfy-kitchen's `nbytes` counts the codes alone)."""
    return sum(tensor.nbytes for tensor in PackedLayout.get_plain_tensors(weight))


def with_dtype(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The same packed bytes, decoding to `dtype`."""
    if weight.dtype == dtype:
        return weight
    return QuantizedTensor(weight._qdata, LAYOUT_NAME, dataclasses.replace(weight.params, orig_dtype=dtype))


def unpack(weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight decoded to a plain tensor of `dtype`, rounded once."""
    if torch.compiler.is_compiling():
        params, parts = weight.params, weight.params.parts
        return traced_dequantize(
            weight._qdata,
            list(parts.values()),
            " ".join(parts),
            params.format,
            list(params.orig_shape),
            dtype,
        )
    return dequantize_packed(packed_tensor(weight), dtype)


def warm_up(weight: QuantizedTensor, device: torch.device) -> None:
    """Decodes some blocks of the weight's format on `device`: puts its lookup tables there, compiles its kernel and has
    the result compared with torch's.

    Of random bytes, as the wrong code decodes zeros, too; a multiple of 16 blocks, as Triton compiles one kernel for
    those, which weights have, and another one for the rest.
    """
    fmt = format_called(weight.params.format)
    if isinstance(fmt, type):
        generator = torch.Generator().manual_seed(0)
        data = torch.randint(
            0, 256, (_WARM_UP_BLOCKS * fmt.block_bytes,), dtype=torch.uint8, generator=generator
        )
        dequantize(data.to(device), fmt, (_WARM_UP_BLOCKS, fmt.block_size), weight.dtype)


def packed_linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, calculated in x's dtype; x [..., in], weight [out, in], bias [out] or None."""
    if torch.compiler.is_compiling():
        return torch.nn.functional.linear(x, unpack(weight, x.dtype), bias)
    return linear(x, packed_tensor(weight), bias)


@register_layout_op(torch.ops.aten.linear.default, PackedLayout)
def _linear(_first: object, args: Any, kwargs: Any) -> torch.Tensor:
    """Code that calls F.linear with the weight itself gets the same kernel as Snug's own Linear."""
    x, weight, bias, *_ = (*args, kwargs.get("bias"))
    x = unpack(x, x.dtype) if is_packed(x) else x
    if not is_packed(weight):
        return torch.nn.functional.linear(x, weight, bias)
    return packed_linear(x, weight, bias)


register_layout_class(LAYOUT_NAME, PackedLayout)
