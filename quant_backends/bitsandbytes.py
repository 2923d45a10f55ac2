"""bitsandbytes: NF4, FP4 and LLM.int8."""

from __future__ import annotations

import math

import torch

from .core.backend import Backend, FileKind, FormatFamily
from .core.packed import PackedTensor
from .formats import Format
from .formats.scaled import BitsAndBytes4Bit, ScaledElements, ScaledFormat

FILES = (FileKind.SAFETENSORS, FileKind.FOLDER)


def _four_bit(kind: str) -> FormatFamily:
    return FormatFamily(
        title=f"{kind.upper()} (bitsandbytes)",
        convention="bitsandbytes-4bit",
        recognised_by=f"keys that end in `.quant_state.bitsandbytes__{kind}`",
        writers="bitsandbytes, diffusers, Forge",
        files=FILES,
        examples=(f"bnb-{kind}-64", f"bnb-{kind}-64-nested-256"),
        bits=(4.12, 4.51),
        label=kind.upper(),
        note="any block size, plain or double quantization",
    )


class BitsAndBytes(Backend):
    name, title = "bitsandbytes", "bitsandbytes"
    package, module = "bitsandbytes", "bitsandbytes"
    families = (
        _four_bit("nf4"),
        _four_bit("fp4"),
        FormatFamily(
            title="INT8 (bitsandbytes)",
            convention="bitsandbytes-int8",
            recognised_by="keys that end in `.SCB`",
            writers="bitsandbytes, diffusers",
            files=FILES,
            examples=("int8-rows-scb",),
            bits=(8.0, 8.04),
            label="INT8",
        ),
    )

    @classmethod
    def handles(cls, fmt: type[Format] | ScaledFormat) -> bool:
        return isinstance(fmt, BitsAndBytes4Bit) or (isinstance(fmt, ScaledElements) and fmt.scb)

    @classmethod
    def decode(cls, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        functional, fmt, parts = cls.library("functional"), packed.format, packed.parts
        if not isinstance(fmt, BitsAndBytes4Bit):
            return functional.int8_vectorwise_dequant(packed.data, parts["scale"].view(-1)).to(dtype)
        own_map = functional.get_4bit_type(fmt.quant_type, packed.data.device)
        if not torch.equal(own_map, parts["quant_map"].view(-1)):
            raise ValueError(f"the file's map of {fmt.quant_type} values is not the library's")
        outer = None
        if fmt.nested:
            outer = functional.QuantState(
                absmax=parts["nested_absmax"].view(-1),
                code=parts["nested_quant_map"].view(-1),
                blocksize=fmt.nested,
                dtype=torch.float32,
            )
        state = functional.QuantState(
            absmax=parts["absmax"].view(-1),
            # Blocks cross rows, which the library's code for AVX-512 overlooks: one row has none to cross.
            shape=torch.Size((1, math.prod(packed.shape))),
            code=own_map,
            blocksize=fmt.block_size,
            quant_type=fmt.quant_type,
            dtype=dtype,
            offset=parts["nested_offset"].view(()) if fmt.nested else None,
            state2=outer,
        )
        return functional.dequantize_4bit(packed.data.view(-1, 1), state).view(packed.shape)

    @classmethod
    def encode(cls, values: torch.Tensor, fmt: type[Format] | ScaledFormat) -> PackedTensor:
        functional, shape = cls.library("functional"), tuple(values.shape)
        if not isinstance(fmt, BitsAndBytes4Bit):
            data, scale, _ = functional.int8_vectorwise_quant(values.half())
            return PackedTensor(data, fmt, shape, {"scale": scale})
        data, state = functional.quantize_4bit(
            values, blocksize=fmt.block_size, quant_type=fmt.quant_type, compress_statistics=bool(fmt.nested)
        )
        parts = {"absmax": state.absmax, "quant_map": state.code}
        if fmt.nested:
            parts |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
            parts["nested_offset"] = state.offset.view(1)
        return PackedTensor(data, fmt, shape, parts)
