"""GGUF: ggml's block formats. The gguf package decodes them with numpy."""

from __future__ import annotations

import torch

from .core.backend import Backend, FileKind, FormatFamily
from .core.packed import PackedTensor
from .formats import FORMATS, Format
from .formats.scaled import ScaledFormat

# Models are made of these; the integer types and F64 of GGUF hold other things.
TYPES = tuple(
    fmt for fmt in FORMATS.values() if fmt.dtype in (None, torch.float32, torch.float16, torch.bfloat16)
)


class GGUF(Backend):
    name, title = "gguf", "GGUF"
    package, module = "gguf", "gguf"
    families = (
        FormatFamily(
            title="GGUF",
            convention="gguf",
            recognised_by="the first four bytes `GGUF`",
            writers="ComfyUI-GGUF's converter, llama.cpp, stable-diffusion.cpp, Snug",
            files=(FileKind.GGUF,),
            examples=tuple(fmt.name for fmt in TYPES),
            bits=(
                min(fmt.block_bytes / fmt.block_size for fmt in TYPES) * 8,
                max(fmt.block_bytes / fmt.block_size for fmt in TYPES) * 8,
            ),
            label=f"GGUF ({len(TYPES)} types)",
        ),
    )

    @classmethod
    def handles(cls, fmt: type[Format] | ScaledFormat) -> bool:
        return isinstance(fmt, type)

    @classmethod
    def decode(cls, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        library = cls.library()
        ggml_type = library.GGMLQuantizationType[packed.format.name]
        found = library.quants.dequantize(packed.data.view(-1).cpu().numpy(), ggml_type)
        return torch.from_numpy(found).view(packed.shape).to(packed.data.device, dtype)

    @classmethod
    def encode(cls, values: torch.Tensor, fmt: type[Format] | ScaledFormat) -> PackedTensor:
        library = cls.library()
        found = library.quants.quantize(values.float().cpu().numpy(), library.GGMLQuantizationType[fmt.name])
        data = torch.from_numpy(found).view(torch.uint8).view(-1).to(values.device)
        assert isinstance(fmt, type)
        return PackedTensor(data, fmt, tuple(values.shape))
