"""The names of CLIP's tensors: OpenCLIP's and stable-diffusion.cpp's become those of Hugging Face's model.

OpenCLIP (mlfoundations/open_clip, transformer.py) keeps query, key and value in one `in_proj` tensor;
stable-diffusion.cpp (name_conversion.cpp) renames the rest and leaves that one as it is, or splits it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch

from ..core.packed import PackedTensor
from .join_rows import rows

Value = TypeVar("Value")

RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$")
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn.in_proj": "self_attn.in_proj",
}
TOPS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
# Without ".weight" it is OpenCLIP's matrix, which multiplies from the right; ComfyUI transposes it under this name.
PROJECTION = {"text_model.text_projection": "text_projection"}
JOINED = re.compile(r"(.+\.self_attn\.)in_proj\.(weight|bias)$")


def hugging_face_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The same values under Hugging Face's names; those of other models stay as they are.

    `self_attn.in_proj` is no name of Hugging Face's: `split_attention` does the rest.
    """
    is_openclip = any(RESBLOCK.match(name) for name in tensors)
    renamed = {**PROJECTION, **(TOPS if is_openclip else {})}
    return {renamed.get(name) or _in_block(name) or name: value for name, value in tensors.items()}


def split_attention(
    name: str, tensor: PackedTensor | torch.Tensor
) -> Iterator[tuple[str, PackedTensor | torch.Tensor]]:
    """Query, key and value of a joined projection, views of its rows; any other tensor as it is."""
    match = JOINED.match(name)
    if match is None or not len(tensor.shape):
        yield name, tensor
        return
    for letter, part in zip("qkv", _thirds(tensor), strict=True):
        yield f"{match[1]}{letter}_proj.{match[2]}", part


def split_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes that `split_attention` leaves."""
    found = {}
    for name, shape in shapes.items():
        match = JOINED.match(name)
        if match is None or not shape:
            found[name] = shape
        else:
            third = (shape[0] // 3, *shape[1:])
            found.update({f"{match[1]}{letter}_proj.{match[2]}": third for letter in "qkv"})
    return found


def _in_block(name: str) -> str | None:
    match = RESBLOCK.match(name)
    part = PARTS.get(match[2]) if match else None
    return f"text_model.encoder.layers.{match[1]}.{part}.{match[3]}" if match and part else None


def _thirds(tensor: PackedTensor | torch.Tensor) -> list[PackedTensor | torch.Tensor]:
    count = tensor.shape[0] // 3
    return [rows(tensor, count * part, count * (part + 1)) for part in range(3)]
