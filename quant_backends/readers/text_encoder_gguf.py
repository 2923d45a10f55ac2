"""Open a text encoder in a GGUF file and give its tensors the names that ComfyUI's text encoders expect.

Opening reads the header only: names and shapes are enough to tell what the file is. The tensors come with
`state_dict()`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..core.errors import FileFormatError
from ..core.packed import PackedTensor
from ..kernels.dequantize import dequantize
from .clip_names import hugging_face_names, split_attention, split_shapes
from .gguf_file import GGUFFile
from .gguf_tensors import TensorInfo
from .gguf_values import Metadata, shown
from .model_kind import text_value
from .repairs import original_shape
from .text_encoder_kinds import projection_names, refuse_other_kinds
from .text_encoder_tables import (
    DIRECT_TENSORS,
    FAMILIES,
    LLAMA_CPP,
    ORIGINAL,
    QUERY_KEY,
    SAFETENSORS_ONLY,
    SHIFTED_NORM,
    T5_UNGATED,
    Family,
    NameMap,
)

FAULTY = "the file was written by a faulty converter: download another conversion of the model"
SUFFIX = re.compile(r"(.+)\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class TextEncoderGGUF:
    """A text encoder whose header has been read.

    architecture: `general.architecture`, None when absent. family: what its converter did to the tensors,
    None when the file keeps the original names. infos: ComfyUI's name to the tensor in the file.
    """

    file: GGUFFile
    architecture: str | None
    family: Family | None
    infos: Mapping[str, TensorInfo]

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def metadata(self) -> Metadata:
        return self.file.metadata

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by the names that `state_dict()` gives them."""
        return split_shapes({name: info.shape for name, info in self.infos.items()})

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def state_dict(
        self, progress: Callable[[int], None] | None = None
    ) -> dict[str, PackedTensor | torch.Tensor]:
        """Name to tensor. Matrices are views of the file, packed unless they are float32; permuted ones
        (query and key of LLaMA and Mistral) are copied, still packed. Vectors are float32.

        progress: called with the bytes of each tensor. Raises FileFormatError when head counts are missing
        or do not fit.
        """
        tensors: dict[str, PackedTensor | torch.Tensor] = {}
        for name, info in self.infos.items():
            tensors.update(split_attention(name, self._load(name, info)))
            if progress is not None:
                progress(info.nbytes)
        return tensors

    def _load(self, name: str, info: TensorInfo) -> PackedTensor | torch.Tensor:
        data = self.file.read(info.name)
        heads = self._permuted_heads(name)
        if heads:
            data = self._unpermuted(info, data, heads)
        tensor = as_stored(name, info, data)
        if self.family is not None and self.family.norm_shift and SHIFTED_NORM.match(name):
            if isinstance(tensor, PackedTensor):
                raise self._faulty(f"the norm {shown(info.name)} is no vector")
            return tensor - self.family.norm_shift
        return tensor

    def _permuted_heads(self, name: str) -> int:
        """Number of heads whose rows the converter reordered in this tensor; 0 for all others."""
        match = QUERY_KEY.match(name)
        if match is None or self.family is None or not self.family.permuted:
            return 0
        key = f"{self.architecture}.attention.head_count"
        heads = self.metadata.integer(key, 0)
        if heads < 1:
            raise self._faulty(
                f"metadata {shown(key)} is missing, so rows of {shown(name)} cannot be put in order"
            )
        return heads if match[1] == "q" else self.metadata.integer(f"{key}_kv", heads)

    def _unpermuted(self, info: TensorInfo, data: torch.Tensor, heads: int) -> torch.Tensor:
        """The same bytes with the rows in the original order. Blocks never cross rows, so whole rows move."""
        rows = info.shape[0] if info.shape else 0
        if heads < 1 or rows < 1 or rows % (2 * heads):
            raise self._faulty(
                f"tensor {shown(info.name)} has {rows} rows, no even number for each of the {heads} heads"
            )
        return data.view(rows, -1).index_select(0, original_row_order(rows, heads)).view(-1)

    def _faulty(self, problem: str) -> FileFormatError:
        return FileFormatError(self.path, problem, FAULTY)


def open_text_encoder_gguf(path: str | os.PathLike[str]) -> TextEncoderGGUF:
    """Read the header of a text encoder's GGUF file.

    Raises FileFormatError when the file is damaged, is something else (a vision part, a LoRA, a diffusion
    model, a whole checkpoint), or has an architecture that Snug does not know.
    """
    file = GGUFFile(path)
    refuse_other_kinds(file.path, file.tensors, file.metadata)
    architecture = text_value(file.metadata, "general.architecture")
    projection = projection_names(file.tensors)
    if projection:
        return TextEncoderGGUF(file, architecture, None, {name: file.tensors[name] for name in projection})
    if not any(LLAMA_CPP.match(name) for name in file.tensors):
        return TextEncoderGGUF(file, architecture, None, hugging_face_names(_original_names(file)))
    if any(name.startswith("enc.blk.") for name in file.tensors):
        family = FAMILIES["t5encoder"]
    else:
        family = FAMILIES.get(architecture or "")
    if family is None and architecture in SAFETENSORS_ONLY:
        raise FileFormatError(
            file.path,
            f"the file is {SAFETENSORS_ONLY[architecture]}, which is not loaded from GGUF files",
            "choose a .safetensors version of it, plain or quantized",
        )
    if family is None:
        named = f"has the architecture {shown(architecture)}" if architecture else "names no architecture"
        raise FileFormatError(
            file.path,
            f"the file {named}, expected one of {', '.join(FAMILIES)}",
            "choose a text encoder that ComfyUI uses",
        )
    gated = any(".ffn_gate." in name for name in file.tensors)
    overrides = T5_UNGATED if family is FAMILIES["t5encoder"] and not gated else {}
    infos = {
        new: _in_original_shape(file, info)
        for name, info in file.tensors.items()
        if (new := mapped_name(name, family.names, overrides)) is not None
    }
    return TextEncoderGGUF(file, architecture, family, infos)


def _in_original_shape(file: GGUFFile, info: TensorInfo) -> TensorInfo:
    """Kernels of a vision part may have five dimensions, one more than ggml has."""
    return info if info.format.dtype is None else replace(info, shape=original_shape(file, info))


def mapped_name(name: str, names: NameMap, overrides: Mapping[str, str] | None = None) -> str | None:
    """ComfyUI's name of a tensor; None when it is dropped. Names that the map does not have stay as they are."""
    if name.startswith(names.dropped):
        return None
    match = SUFFIX.match(name)
    if match is None:
        return name
    block = names.block.match(match[1])
    if block is None:
        new = names.tops.get(match[1])
    else:
        part = (overrides or {}).get(block[2]) or names.parts.get(block[2])
        new = part and names.block_prefix.format(block[1]) + part
    if new and new.endswith(names.bare):
        return new
    return f"{new}.{match[2]}" if new else name


def original_row_order(rows: int, heads: int) -> torch.Tensor:
    """Where the original rows of a query or key projection are in llama.cpp's files; int64, [rows].

    llama.cpp (LlamaModel.permute) stores row j of half i of each head at 2 j + i. rows: a multiple of 2 heads.
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def as_stored(name: str, info: TensorInfo, data: torch.Tensor) -> PackedTensor | torch.Tensor:
    """The bytes of a tensor as what ComfyUI needs of it: packed, or plain where no operation decodes it.

    float16 and bfloat16 matrices count as packed too: ComfyUI would copy plain ones to float32, the dtype its
    text encoders calculate in.
    """
    dtype = info.format.dtype
    if dtype is not None and (dtype is torch.float32 or not dtype.is_floating_point):
        return data.view(dtype).view(info.shape)
    if len(info.shape) <= 1 or DIRECT_TENSORS.match(name):
        return dequantize(data, info.format, info.shape, torch.float32)
    return PackedTensor(data, info.format, info.shape)


def _original_names(file: GGUFFile) -> dict[str, TensorInfo]:
    """Names without what a checkpoint put before them."""
    prefixes = {match[0] for name in file.tensors if (match := ORIGINAL.match(name))}
    if not prefixes:
        architecture = text_value(file.metadata, "general.architecture")
        known_as = f" ({architecture})" if architecture and architecture.isidentifier() else ""
        raise FileFormatError(
            file.path,
            f"the file is no text encoder that Snug knows{known_as}",
            "choose another file; load diffusion models with Load Diffusion Model (Snug)",
        )
    prefix = min(prefixes, key=len)
    return {name.removeprefix(prefix): info for name, info in file.tensors.items() if name.startswith(prefix)}
