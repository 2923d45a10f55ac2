"""torchao: int8 and float8 weights in its safetensors form."""

from __future__ import annotations

import torch

from .core.backend import Backend, FileKind, FormatFamily, Status
from .core.packed import PackedTensor
from .formats import Format
from .formats.scaled import ScaledElements, ScaledFormat
from .formats.scaled_base import rows_and_columns
from .formats.scaled_elements import STORED

WRITERS = "torchao, diffusers"
DESCRIPTION = "`tensor_names` in the metadata"
FILES = (FileKind.SAFETENSORS, FileKind.FOLDER)


class TorchAO(Backend):
    name, title = "torchao", "torchao"
    package, module = "torchao", "torchao"
    families = (
        FormatFamily(
            title="INT8 (torchao)",
            convention="torchao",
            recognised_by=DESCRIPTION,
            writers=WRITERS,
            files=FILES,
            examples=("int8-rows", "int8-1x128", "int8-1x32-zero"),
            bits=(8.0, 9.26),
            label="torchao",
            note="by row or by group; integers of fewer bits take a byte each",
        ),
        FormatFamily(
            title="FP8 (torchao)",
            convention="torchao",
            recognised_by=DESCRIPTION,
            writers=WRITERS,
            files=FILES,
            examples=("float8_e4m3fn-rows", "float8_e4m3fn-tensor", "float8_e5m2-rows"),
            bits=(8.0, 8.04),
            label="torchao",
            devices="where torch has float8",
        ),
        FormatFamily(
            title="INT4, NVFP4, MX (torchao)",
            convention="torchao",
            recognised_by=DESCRIPTION,
            writers=WRITERS,
            files=FILES,
            status=Status.REFUSED,
            note="their layouts are made for one kind of GPU or kernel; take torchao INT8 or FP8, NF4 or GGUF",
        ),
    )

    @classmethod
    def handles(cls, fmt: type[Format] | ScaledFormat) -> bool:
        stored = ("int8", "float8_e4m3fn", "float8_e5m2")
        return isinstance(fmt, ScaledElements) and fmt.stored in stored and not fmt.scb

    @classmethod
    def decode(cls, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        quantization, fmt = cls.library("quantization"), packed.format
        assert isinstance(fmt, ScaledElements)
        sizes = rows_and_columns(packed.shape)
        block = [block or size for block, size in zip(fmt.block, sizes, strict=True)]
        grid = [-(-size // step) for size, step in zip(sizes, block, strict=True)]
        data = packed.data.view(sizes)
        parts = {name: part.view(grid) for name, part in packed.parts.items()}
        if STORED[fmt.stored] != torch.int8:
            tensor = quantization.Float8Tensor(data, parts["scale"], block_size=block, dtype=dtype)
        elif fmt.zero:
            tensor = quantization.IntxUnpackedToInt8Tensor(
                data, parts["scale"], parts["zero"], torch.int8, tuple(block), dtype, None
            )
        else:
            tensor = quantization.Int8Tensor(data, parts["scale"], block_size=block, dtype=dtype)
        return tensor.dequantize().view(packed.shape)

    @classmethod
    def encode(cls, values: torch.Tensor, fmt: type[Format] | ScaledFormat) -> PackedTensor:
        quantization = cls.library("quantization")
        assert isinstance(fmt, ScaledElements)
        granularity = {(1, 0): quantization.PerRow(), (0, 0): quantization.PerTensor()}.get(fmt.block)
        granularity = granularity or quantization.PerGroup(fmt.block[1])
        if STORED[fmt.stored] != torch.int8:
            tensor = quantization.Float8Tensor.from_hp(values, STORED[fmt.stored], granularity)
            return PackedTensor(tensor.qdata, fmt, tuple(values.shape), {"scale": tensor.scale})
        tensor = quantization.Int8Tensor.from_hp(values, granularity)
        zero = {"zero": tensor.zero_point} if fmt.zero else {}
        return PackedTensor(tensor.qdata, fmt, tuple(values.shape), {"scale": tensor.scale, **zero})
