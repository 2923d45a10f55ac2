"""Figures that others have published for the techniques of this pack, as they stand there; hardware as they say."""

from __future__ import annotations

from dataclasses import dataclass

FLUX_SOURCE = (
    "Exploring Quantization Backends in Diffusers, https://huggingface.co/blog/diffusers-quantization: Flux.1-dev, one "
    "H100 80 GB, 1024 x 1024, 50 steps, guidance 3.5, 512 tokens; transformer and T5 quantized, in bfloat16 otherwise"
)
PIXART_SOURCE = (
    "Memory-efficient Diffusion Transformers with Quanto and Diffusers, "
    "https://huggingface.co/blog/quanto-diffusers: PixArt-Sigma, one H100, float16, one picture"
)
SDXL_SOURCE = "lesson on quantization and efficiency: Stable Diffusion XL, sizes of the whole model"


@dataclass(frozen=True)
class Published:
    """name: as published. target: what of ours it is, a target of Quantize Model, None for none.

    encoder: of the text encoder, "same" for the same. loaded, peak: GB; seconds; compile_seconds.
    """

    name: str
    target: str | None
    loaded: float | None
    peak: float | None = None
    seconds: float | None = None
    compile_seconds: float | None = None
    is_compiled: bool = False
    encoder: str | None = "same"


FLUX = (
    Published("BF16", None, 31.447, 36.166, 12),
    Published("bitsandbytes 4-bit NF4", "bitsandbytes NF4", 12.584, 17.281, 12),
    Published("bitsandbytes 8-bit", "bitsandbytes INT8", 19.273, 24.432, 27),
    Published("torchao int8 weight-only", "torchao int8", 17.020, 21.482, 15),
    Published("torchao float8 weight-only", "torchao float8", 17.016, 21.488, 15),
    Published("quanto INT4", "quanto int4", 12.254, 16.139, 109),
    Published("quanto INT8", "quanto int8", 17.330, 21.814, 15),
    Published("quanto FP8", "quanto float8", 16.395, 20.898, 16),
    Published("GGUF Q2_K", "GGUF Q2_K", 13.264, 17.752, 26, encoder=None),
    Published("GGUF Q4_1", "GGUF Q4_1", 16.838, 21.326, 23, encoder=None),
    Published("GGUF Q8_0", "GGUF Q8_0", 21.502, 25.973, 15, encoder=None),
    Published("FP8 layerwise casting (e4m3)", "FP8 e4m3fn per tensor", 23.682, 28.451, 13, encoder=None),
    Published("torchao int8, torch.compile", "torchao int8", 17.020, 22.473, 8, 851, True),
    Published("torchao float8, torch.compile", "torchao float8", 17.016, 22.115, 8, 545, True),
)
PIXART = (
    Published("FP16", None, 12.086, seconds=1.200),
    Published("FP8 transformer", "quanto float8", 11.547, seconds=1.540, encoder=None),
    Published("FP8 transformer and text encoder", "quanto float8", 5.363, seconds=1.601),
    Published("INT8 transformer and text encoder", "quanto int8", 5.363, seconds=1.538),
    Published("INT4 transformer (BF16)", "quanto int4", 9.380, seconds=7.431, encoder=None),
    Published("INT4 transformer and text encoder (BF16)", "quanto int4", 3.058, seconds=7.604),
)
SDXL = (
    Published("FP16/BF16", None, 7.0),
    Published("INT8 (post-training, calibrated)", "bitsandbytes INT8", 3.5),
    Published("INT4 (NF4, double quantization)", "bitsandbytes NF4 double", 1.8),
)
