"""Writes text encoders as GGUF files with llama.cpp's names, rows and norms: the way back of the reader."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..kernels.dequantize import dequantize_packed
from ..readers.text_encoder_gguf import original_row_order
from ..readers.text_encoder_tables import FAMILIES, QUERY_KEY, SHIFTED_NORM, T5_UNGATED, Family
from .gguf_file import MetadataValue, Progress, write_gguf

Tensors = Mapping[str, "torch.Tensor | PackedTensor"]
_SUFFIX = re.compile(r"(.+)\.(weight|bias)$")
# What is inside a block, in all families.
_PART = re.compile(r"(?:model\.layers|encoder\.block)\.\d+\.(.+?)(?:\.weight|\.bias)?$")
_BLOCK = re.compile(r"(?:model\.layers|encoder\.block)\.(\d+)\.")
# A size to tensors whose number of rows it is.
_SIZES = {
    "embedding_length": ("model.norm.weight", "encoder.final_layer_norm.weight"),
    "feed_forward_length": (
        "model.layers.0.mlp.up_proj.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight",
    ),
}
_T5_QUERY, _T5_BIAS = (
    f"encoder.block.0.layer.0.SelfAttention.{part}.weight" for part in ("q", "relative_attention_bias")
)


def write_text_encoder_gguf(
    path: str | os.PathLike[str],
    tensors: Tensors,
    architecture: str,
    format: str | None,
    *,
    metadata: Mapping[str, MetadataValue] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a text encoder to the GGUF file `path`.

    tensors: by the names of the original model ("encoder.block.0.layer.0.SelfAttention.q.weight",
        "model.layers.0.self_attn.q_proj.weight"), taken one at a time; packed ones in ggml's formats stay as they are.
    architecture: llama.cpp's name, a key of `FAMILIES` such as "t5encoder", "llama", "qwen2vl", "gemma3".
    format, progress: as `write_gguf` takes them.
    metadata: further keys, among them the tokenizer ("tokenizer.ggml.…", as in the file that the encoder comes from)
        and for LLaMA and Mistral "<architecture>.attention.head_count" and "….head_count_kv", which order their rows.

    Raises SnugError as `write_gguf` does, for an unknown architecture, and when head counts are missing or do not fit.
    """
    if architecture not in FAMILIES:
        raise SnugError(
            f"{architecture!r} is no text encoder that can be written; choose one of {', '.join(FAMILIES)}."
        )
    given = {**_sizes(tensors, architecture), **(metadata or {})}
    # Each is written once: the writer names the architecture and the file type itself.
    for key in ("general.architecture", "general.file_type", "general.quantization_version"):
        given.pop(key, None)
    renamed = _LlamaCpp(tensors, FAMILIES[architecture], architecture, given)
    write_gguf(path, renamed, format, architecture=architecture, metadata=given, progress=progress)


def text_encoder_architecture(names: Collection[str]) -> str | None:
    """llama.cpp's name of a text encoder by the original names of its tensors; None when it has no names for them."""
    parts = {match[1] for name in names if (match := _PART.match(name))}
    if "layer.0.SelfAttention.q" in parts:
        found = "t5encoder"
    elif "self_attn.q_proj" not in parts:
        return None
    elif "pre_feedforward_layernorm" in parts:
        gemma3 = "gemma3" if "self_attn.q_norm" in parts else "gemma2"
        found = "gemma4" if any(name.endswith(".layer_scalar") for name in names) else gemma3
    else:
        sees = "vl" if any(name.startswith(("visual.", "model.visual.")) for name in names) else ""
        biased = any(name.endswith(".self_attn.q_proj.bias") for name in names)
        qwen = "qwen3" if "self_attn.q_norm" in parts else "qwen2" if biased else None
        found = f"{qwen}{sees}" if qwen else "llama"
    rename = _renamer(FAMILIES[found], any(".wi." in name for name in names))
    return None if any(_PART.match(name) and rename(name) == name for name in names) else found


def _sizes(tensors: Tensors, architecture: str) -> dict[str, MetadataValue]:
    """What llama.cpp asks of a file and the shapes of small tensors tell."""
    found: dict[str, MetadataValue] = {}
    numbers = [int(match[1]) for name in tensors if (match := _BLOCK.match(name))]
    if numbers:
        found["block_count"] = max(numbers) + 1
    for key, names in _SIZES.items():
        name = next((name for name in names if name in tensors), None)
        if name is not None:
            found[key] = int(tensors[name].shape[0])
    if _T5_BIAS in tensors:
        buckets, heads = map(int, tensors[_T5_BIAS].shape)
        size = int(tensors[_T5_QUERY].shape[0]) // heads if _T5_QUERY in tensors else 0
        found |= {
            "attention.head_count": heads,
            "attention.key_length": size,
            "attention.value_length": size,
            "attention.relative_buckets_count": buckets,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "context_length": 512,
        }
    return {f"{architecture}.{key}": value for key, value in found.items() if value}


class _LlamaCpp(Mapping[str, "torch.Tensor | PackedTensor"]):
    """The tensors under llama.cpp's names, changed as its converter changes them when they are taken."""

    def __init__(
        self,
        tensors: Tensors,
        family: Family,
        architecture: str,
        metadata: Mapping[str, MetadataValue],
    ) -> None:
        self._tensors, self._family = tensors, family
        self._heads = {"q": 0, "k": 0}
        if family.permuted:
            key = f"{architecture}.attention.head_count"
            heads = metadata.get(key)
            if not isinstance(heads, int) or heads < 1:
                raise SnugError(
                    f"The metadata {key} is missing, which orders the rows of query and key; pass the number of heads."
                )
            shared = metadata.get(f"{key}_kv", heads)
            self._heads = {"q": heads, "k": shared if isinstance(shared, int) else heads}
        rename = _renamer(family, any(".wi." in name for name in tensors))
        self._names = {rename(name): name for name in tensors}

    def __getitem__(self, name: str) -> torch.Tensor | PackedTensor:
        original = self._names[name]
        tensor = self._tensors[original]
        match = QUERY_KEY.match(original)
        if match and self._heads[match[1]]:
            tensor = _permuted(original, tensor, self._heads[match[1]])
        if self._family.norm_shift and SHIFTED_NORM.match(original):
            values = dequantize_packed(tensor) if isinstance(tensor, PackedTensor) else tensor.float()
            tensor = values + self._family.norm_shift
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _renamer(family: Family, ungated: bool) -> Callable[[str], str]:
    """From original names to llama.cpp's; names that it has no others for stay as they are."""
    names = family.names
    parts = {original: part for part, original in names.parts.items()}
    if ungated:
        parts.update({original: part for part, original in T5_UNGATED.items()})
    tops = {original: top for top, original in names.tops.items()}
    block = re.compile(re.escape(names.block_prefix).replace(re.escape("{}"), r"(\d+)") + "(.+)")
    prefix = "enc.blk" if names.block.pattern.startswith("enc") else "blk"

    def rename(name: str) -> str:
        match = _SUFFIX.match(name)
        stem, suffix = (match[1], match[2]) if match else (name, "weight")
        found = block.match(stem)
        if found:
            part = parts.get(found[2])
            new = part and f"{prefix}.{found[1]}.{part}"
        else:
            new = tops.get(stem)
        return f"{new}.{suffix}" if new and (match or stem.endswith(names.bare)) else name

    return rename


def _permuted(name: str, tensor: torch.Tensor | PackedTensor, heads: int) -> torch.Tensor | PackedTensor:
    """The rows in llama.cpp's order. Blocks never cross rows, so packed rows move whole."""
    rows = tensor.shape[0] if len(tensor.shape) else 0
    if rows < 1 or rows % (2 * heads):
        raise SnugError(
            f"{name} has {rows} rows, no even number for each of the {heads} heads; check head_count."
        )
    order = original_row_order(rows, heads).argsort()
    if isinstance(tensor, PackedTensor):
        data = tensor.data.view(rows, -1).index_select(0, order.to(tensor.data.device)).view(-1)
        return PackedTensor(data, tensor.format, tensor.shape, tensor.parts)
    return tensor.index_select(0, order.to(tensor.device))
