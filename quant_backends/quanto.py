"""optimum-quanto: qint8, qfloat8, qint4 and qint2."""

from __future__ import annotations

import torch

from .core.backend import Backend, FileKind, FormatFamily
from .core.packed import PackedTensor
from .formats import Format
from .formats.scaled import QuantoGroups, ScaledElements, ScaledFormat

WRITERS = "optimum-quanto, diffusers"
FILES = (FileKind.SAFETENSORS, FileKind.FOLDER)


class Quanto(Backend):
    name, title = "quanto", "quanto"
    package, module = "optimum-quanto", "optimum.quanto"
    families = (
        FormatFamily(
            title="qint8 (quanto)",
            convention="quanto",
            recognised_by="`._data` of int8 with `._scale`",
            writers=WRITERS,
            files=FILES,
            examples=("int8-rows", "int8-tensor"),
            bits=(8.0, 8.04),
            label="quanto",
        ),
        FormatFamily(
            title="qfloat8 (quanto)",
            convention="quanto",
            recognised_by="`._data` of float8 with `._scale`",
            writers=WRITERS,
            files=FILES,
            examples=("float8_e4m3fn-rows", "float8_e5m2-rows"),
            bits=(8.0, 8.04),
            label="quanto",
            devices="where torch has float8",
        ),
        FormatFamily(
            title="qint4, qint2 (quanto)",
            convention="quanto",
            recognised_by="`._data._data` with `._scale` and `._shift`",
            writers=WRITERS,
            files=FILES,
            examples=("quanto-int4-128", "quanto-int2-128"),
            bits=(2.49, 4.51),
            label="quanto",
            note="a layer without a bias needs the folder's config.json, which tells its shape",
        ),
    )

    @classmethod
    def handles(cls, fmt: type[Format] | ScaledFormat) -> bool:
        if isinstance(fmt, ScaledElements):
            return fmt.block in ((0, 0), (1, 0)) and fmt.stored != "uint8" and not (fmt.zero or fmt.scb)
        return isinstance(fmt, QuantoGroups)

    @classmethod
    def decode(cls, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        quanto, fmt, parts = cls.library(), packed.format, packed.parts
        shape = torch.Size(packed.shape)
        stride = torch.empty(shape, device="meta").stride()
        if isinstance(fmt, QuantoGroups):
            packing = cls.library("tensor.packed")
            groups = parts["scale"].numel()
            data = packing.PackedTensor(
                packed.data.view(-1, fmt.group_size),
                fmt.bits,
                torch.Size((groups, fmt.group_size)),
                (fmt.group_size, 1),
            )
            tensor = quanto.WeightQBitsTensor(
                quanto.qtypes[f"qint{fmt.bits}"],
                0,
                fmt.group_size,
                shape,
                stride,
                data,
                parts["scale"].view(groups, 1),
                parts["shift"].view(groups, 1),
            )
            return tensor.dequantize().to(dtype)
        assert isinstance(fmt, ScaledElements)
        by_row = fmt.block == (1, 0)
        scale = parts["scale"].view(-1, *[1] * (len(shape) - 1)) if by_row else parts["scale"].view(())
        qtype = quanto.qtypes["qint8" if fmt.stored == "int8" else f"q{fmt.stored}"]
        tensor = quanto.WeightQBytesTensor(
            qtype, 0 if by_row else None, shape, stride, packed.data.view(shape), scale, None
        )
        return tensor.dequantize().to(dtype)

    @classmethod
    def encode(cls, values: torch.Tensor, fmt: type[Format] | ScaledFormat) -> PackedTensor:
        quanto, shape = cls.library(), tuple(values.shape)
        weights = cls.library("tensor.weights")
        if isinstance(fmt, QuantoGroups):
            qtype = quanto.qtypes[f"qint{fmt.bits}"]
            size = None if values[0].numel() == fmt.group_size else fmt.group_size
            scale, shift = quanto.MaxOptimizer()(values, qtype=qtype, axis=0, group_size=size)
            tensor = weights.quantize_weight(
                values, qtype=qtype, axis=0, scale=scale, shift=shift, group_size=size, optimized=False
            )
            return PackedTensor(tensor._data._data, fmt, shape, {"scale": scale, "shift": shift})
        assert isinstance(fmt, ScaledElements)
        qtype = quanto.qtypes["qint8" if fmt.stored == "int8" else f"q{fmt.stored}"]
        scale = quanto.AbsmaxOptimizer()(values, qtype=qtype, axis=0 if fmt.block == (1, 0) else None)
        tensor = weights.quantize_weight(values, qtype=qtype, axis=0, scale=scale, optimized=False)
        return PackedTensor(tensor._data, fmt, shape, {"scale": scale})
