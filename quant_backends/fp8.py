"""Scaled FP8: float8 weights with a scale for the tensor, each row or each block; comfy-kitchen is ComfyUI's kernel."""

from __future__ import annotations

import torch

from .core.backend import Backend, FileKind, FormatFamily, Status
from .core.packed import PackedTensor
from .formats import Format
from .formats.scaled import ScaledElements, ScaledFormat

FLOAT8_DEVICES = "where torch has float8"


class FP8(Backend):
    name, title = "fp8", "Scaled FP8"
    package, module = "comfy-kitchen", "comfy_kitchen"
    families = (
        FormatFamily(
            title="Scaled FP8",
            convention="scaled-fp8",
            recognised_by="`scaled_fp8`, `.scale_weight` or `.weight_scale` beside float8",
            writers="ComfyUI's and Kijai's scaled FP8 models",
            files=(FileKind.SAFETENSORS,),
            examples=("float8_e4m3fn-tensor", "float8_e4m3fn-rows", "float8_e5m2-tensor", "float8_e5m2-rows"),
            bits=(8.0, 8.04),
            label="FP8",
            devices=FLOAT8_DEVICES,
        ),
        FormatFamily(
            title="Block-scaled FP8",
            convention="scaled-fp8",
            recognised_by="`.weight_scale_inv`, or `.weight_scale` in two dimensions, beside float8",
            writers="DeepSeek, Qwen, transformers",
            files=(FileKind.SAFETENSORS,),
            examples=("float8_e4m3fn-128x128",),
            bits=(8.0, 8.04),
            label="FP8",
            devices=FLOAT8_DEVICES,
        ),
        FormatFamily(
            title="FP8 without scales, F16, BF16, F32",
            convention="plain",
            recognised_by="nothing of the other lines",
            writers="everybody",
            files=(FileKind.SAFETENSORS, FileKind.FOLDER),
            status=Status.COMFYUI,
        ),
    )

    @classmethod
    def handles(cls, fmt: type[Format] | ScaledFormat) -> bool:
        if not isinstance(fmt, ScaledElements) or fmt.zero or fmt.scb:
            return False
        return fmt.stored in ("float8_e4m3fn", "float8_e5m2") and fmt.block == (0, 0)

    @classmethod
    def decode(cls, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        scale = packed.parts["scale"].view(())
        return cls.library().dequantize_per_tensor_fp8(packed.data.view(packed.shape), scale, dtype)

    @classmethod
    def encode(cls, values: torch.Tensor, fmt: type[Format] | ScaledFormat) -> PackedTensor:
        assert isinstance(fmt, ScaledElements)
        largest = torch.finfo(fmt.data_dtype).max
        scale = (values.abs().amax().float() / largest).clamp_(min=torch.finfo(torch.float32).tiny)
        data = cls.library().quantize_per_tensor_fp8(values, scale, fmt.data_dtype)
        return PackedTensor(data, fmt, tuple(values.shape), {"scale": scale})
