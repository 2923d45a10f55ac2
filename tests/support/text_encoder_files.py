"""Text encoders as llama.cpp's converters write them, from the tensors of the original model.

Independent of Snug's readers: names come from the gguf package's own mapping, and rows and norms are changed
with the converters' formulas. Weights should lie on the format's grid (`snap`), so that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
PATCH_EMBEDDING = "patch_embed.proj.weight"
DEEPSTACK_LAYERS = (5, 11, 17)


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


def gguf_names(names: Iterable[str], architecture: str) -> dict[str, str]:
    """Original name to llama.cpp's."""
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    mapping = gguf.get_tensor_name_map(kind, 128)
    found = {name: mapping.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    assert None not in found.values(), [name for name, new in found.items() if new is None]
    return {name: new for name, new in found.items() if new is not None}


def vision_names(names: Iterable[str], projector: str) -> dict[str, list[str]]:
    """Name in the vision tower ("blocks.0.norm1.weight") to llama.cpp's: several where it splits a tensor."""
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 32)
    qwen3 = projector == "qwen3vl_merger"
    found = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if name == PATCH_EMBEDDING:
            found[name] = ["v.patch_embd.weight", "v.patch_embd.weight.1"]
        elif stem.startswith("deepstack_merger_list."):
            _, number, part = stem.split(".")
            found[name] = [
                f"v.deepstack.{DEEPSTACK_LAYERS[int(number)]}.{part.replace('linear_', '')}.{suffix}"
            ]
        elif stem.endswith(".attn.qkv") and not qwen3:
            parts = [mapping.get_name(f"visual.{stem.removesuffix('qkv')}{letter}") for letter in "qkv"]
            found[name] = [f"{part}.{suffix}" for part in parts]
        else:
            new = QWEN3VL_MERGER.get(stem) if qwen3 else None
            new = new or mapping.get_name(f"visual.{stem}")
            assert new is not None, f"the gguf package has no name for {name}"
            found[name] = [f"{new}.{suffix}"]
    return found


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
    names = gguf_names(tensors, architecture)
    writer = gguf.GGUFWriter(path, architecture)
    if heads is not None:
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(heads[1])
    if setup is not None:
        setup(writer)
    for name, tensor in tensors.items():
        if heads is not None and architecture in ("llama", "mistral3"):
            if ".q_proj." in name:
                tensor = permute(tensor, heads[0])
            if ".k_proj." in name:
                tensor = permute(tensor, heads[1])
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            tensor = tensor + 1
        add(writer, names[name], tensor, format)
    for name, tensor in (extra or {}).items():
        add(writer, name, tensor, "F32")
    return finish(writer, path)


def write_mmproj(
    path: Path, tensors: Mapping[str, torch.Tensor], projector: str, format: str = "Q8_0"
) -> Path:
    """tensors: names of the vision tower without ComfyUI's prefix ("blocks.0.norm1.weight")."""
    names = vision_names(tensors, projector)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_string("clip.projector_type", projector)
    for name, tensor in tensors.items():
        new = names[name]
        parts = tensor.unbind(2) if name == PATCH_EMBEDDING else tensor.chunk(len(new))
        for stored, part in zip(new, parts, strict=True):
            add(writer, stored, part, format)
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
