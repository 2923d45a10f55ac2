"""A GGUF file and its dense twin: the same weights, dequantized, as plain safetensors.

The twin goes through ComfyUI's own loader. Whatever differs between the two runs is Snug's doing and not the
quantization's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from native_quantizer import native_quantizer
from safetensors.torch import load_file, save_file
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers import load_diffusion_gguf
from snug.quant_backends.writers.gguf_file import write_gguf


@dataclass(frozen=True)
class Twins:
    """packed_bytes, packed_weights: size and number of the quantized weights in the GGUF file."""

    gguf: Path
    dense: Path
    packed_bytes: int
    packed_weights: int

    def load(self) -> tuple[Any, Any]:
        """Freshly loaded (packed, dense) model patchers. Needs ComfyUI in this process."""
        import comfy.sd
        from snug.nodes.adapter.loading import load_diffusion_model

        return load_diffusion_model(str(self.gguf)), comfy.sd.load_diffusion_model(str(self.dense))


def make_twins(source: Path, folder: Path, format: str) -> Twins:
    """Writes `source` (safetensors) to `folder` as GGUF in `format`, and the float32 twin beside it."""
    path = folder / f"{source.stem}-{format}.gguf"
    write_gguf(path, load_file(source), format, quantizer=native_quantizer)
    tensors = load_diffusion_gguf(path).state_dict
    packed = [tensor for tensor in tensors.values() if isinstance(tensor, PackedTensor)]
    twin = path.with_suffix(".safetensors")
    save_file({name: _dense(tensor) for name, tensor in tensors.items()}, twin)
    return Twins(
        path, twin, sum(tensor.nbytes for tensor in packed), sum(torch.Size(t.shape).numel() for t in packed)
    )


def _dense(tensor: PackedTensor | torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, PackedTensor):
        return dequantize_packed(tensor)
    return tensor.float().clone()
