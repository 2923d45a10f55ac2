"""ComfyUI's int8: a scale for each row or the tensor, input channels rotated or not; comfy-kitchen is its kernel."""

from __future__ import annotations

from typing import Any

import torch

from .core.backend import Backend, FileKind, FormatFamily
from .core.packed import PackedTensor
from .formats import Format
from .formats.scaled import RotatedRows, ScaledElements, ScaledFormat


class INT8(Backend):
    name, title = "int8", "INT8"
    package, module = "comfy-kitchen", "comfy_kitchen"
    families = (
        FormatFamily(
            title="INT8 (ComfyUI)",
            convention="core",
            recognised_by="`.comfy_quant` or `_quantization_metadata` that names int8_tensorwise",
            writers="ComfyUI's own conversion scripts, Snug",
            files=(FileKind.SAFETENSORS,),
            examples=("int8-rows", "int8-tensor", "int8-rows-rotated-256"),
            bits=(8.0, 8.04),
            label="INT8",
        ),
    )

    @classmethod
    def handles(cls, fmt: type[Format] | ScaledFormat) -> bool:
        if isinstance(fmt, ScaledElements):
            return fmt.stored == "int8" and fmt.block in ((0, 0), (1, 0)) and not (fmt.zero or fmt.scb)
        return isinstance(fmt, RotatedRows)

    @classmethod
    def decode(cls, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        layout, fmt = cls.library("tensor").TensorWiseINT8Layout, packed.format
        by_row = not isinstance(fmt, ScaledElements) or fmt.block == (1, 0)
        rotated = (
            {"convrot": True, "convrot_groupsize": fmt.group_size} if isinstance(fmt, RotatedRows) else {}
        )
        params = layout.Params(
            scale=packed.parts["scale"].view((-1, 1) if by_row else ()),
            orig_dtype=dtype,
            orig_shape=packed.shape,
            **rotated,
        )
        return layout.dequantize(packed.data.view(packed.shape), params)

    @classmethod
    def encode(cls, values: torch.Tensor, fmt: type[Format] | ScaledFormat) -> PackedTensor:
        options: dict[str, Any] = {"is_weight": True}
        if isinstance(fmt, RotatedRows):
            options |= {"per_channel": True, "convrot": True, "convrot_groupsize": fmt.group_size}
        elif isinstance(fmt, ScaledElements):
            options["per_channel"] = fmt.block == (1, 0)
        data, params = cls.library("tensor").TensorWiseINT8Layout.quantize(values, **options)
        return PackedTensor(data, fmt, tuple(values.shape), {"scale": params.scale})
