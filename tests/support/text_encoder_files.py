"""Text encoders as llama.cpp's converters write them, from the tensors of the original model.

Independent of Snug's readers: names come from the gguf package's own mapping, and rows and norms are changed
with the converters' formulas. Weights should lie on the format's grid (`snap`), so that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

# What convert_hf_to_gguf.py names by hand instead of through the mapping.
QWEN3VL_MERGER = {
    "merger.norm": "v.post_ln",
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
}


def snap(values: torch.Tensor, format: str) -> torch.Tensor:
    """values (float32, [rows, columns]) rounded to what `format` can store exactly."""
    kind = gguf.GGMLQuantizationType[format]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(values.numpy(), kind), kind).copy())


def permute(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute of the converter."""
    rows = weights.shape[0]
    return (
        weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_text_encoder(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    architecture: str,
    format: str = "Q8_0",
    heads: tuple[int, int] | None = None,
    setup: Callable[[Any], None] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """heads: (query, key/value) heads, written to the metadata and, for llama, used to permute. setup: called
    with the writer. extra: tensors under llama.cpp's names, stored as float32.
    """
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    blocks = 1 + max((int(part) for name in tensors for part in name.split(".") if part.isdigit()), default=0)
    mapping = gguf.get_tensor_name_map(kind, blocks)
    writer = gguf.GGUFWriter(path, architecture)
    if heads is not None:
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(heads[1])
    if setup is not None:
        setup(writer)
    for name, tensor in tensors.items():
        new = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, f"the gguf package has no name for {name}"
        if heads is not None and architecture in ("llama", "mistral3"):
            if ".q_proj." in name:
                tensor = permute(tensor, heads[0])
            if ".k_proj." in name:
                tensor = permute(tensor, heads[1])
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            tensor = tensor + 1
        add(writer, new, tensor, format)
    for name, tensor in (extra or {}).items():
        add(writer, name, tensor, "F32")
    return finish(writer, path)


def write_mmproj(
    path: Path, tensors: Mapping[str, torch.Tensor], projector: str, format: str = "Q8_0"
) -> Path:
    """tensors: names of the vision tower without ComfyUI's prefix ("blocks.0.norm1.weight")."""
    deepstack = sorted({name.split(".")[1] for name in tensors if name.startswith("deepstack_merger_list.")})
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 32)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_string("clip.projector_type", projector)
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        new = QWEN3VL_MERGER.get(stem) if "qwen3vl" in projector else None
        if stem == "patch_embed.proj" and suffix == "weight":
            add(writer, "v.patch_embd.weight", tensor[:, :, 0], "F32")
            add(writer, "v.patch_embd.weight.1", tensor[:, :, 1], "F32")
            continue
        if stem.startswith("deepstack_merger_list."):
            _, number, part = stem.split(".")
            layer = (5, 11, 17)[deepstack.index(number)]
            new = f"v.deepstack.{layer}.{part.replace('linear_', '')}"
        if stem.endswith(".attn.qkv") and "qwen3vl" not in projector:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                split = mapping.get_name(f"visual.{stem.removesuffix('qkv')}{letter}")
                add(writer, f"{split}.{suffix}", part, format)
            continue
        new = new or mapping.get_name(f"visual.{stem}")
        assert new is not None, f"the gguf package has no name for {name}"
        add(writer, f"{new}.{suffix}", tensor, format)
    return finish(writer, path)


def add(writer: Any, name: str, tensor: torch.Tensor, format: str) -> None:
    """Matrices in `format`, everything else in float32, as llama.cpp stores vectors."""
    values = np.ascontiguousarray(tensor.float().numpy())
    if tensor.dim() == 2 and format != "F32" and tensor.shape[-1] % 32 == 0:
        kind = gguf.GGMLQuantizationType[format]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values)


def finish(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
