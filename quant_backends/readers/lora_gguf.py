"""LoRA adapters in GGUF files.

llama.cpp's convert_lora_to_gguf.py: `general.type` "adapter", `adapter.type` "lora", `adapter.lora.alpha` (0: the
product is not scaled); for each changed weight `<name>.weight.lora_a` [rank, in] and `<name>.weight.lora_b`
[out, rank] under llama.cpp's name of the weight, of the embedding table both transposed; rows of the query and key
projections of LLaMA are reordered as in the model's own file. Files for diffusion models use the model's names.
Other tools keep the names of the LoRA that they converted; those need nothing but decoding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from ..core.errors import FileFormatError
from ..kernels.dequantize import dequantize
from .gguf_file import GGUFFile
from .gguf_tensors import TensorInfo
from .gguf_values import REDOWNLOAD, shown
from .lora_names import is_lora
from .model_kind import text_value
from .text_encoder_gguf import mapped_name, original_row_order
from .text_encoder_tables import FAMILIES, LLAMA_CPP, QUERY_KEY, Family

FACTOR = re.compile(r"(.+?)(\.weight)?\.lora_([ab])$")
EMBEDDINGS = ("shared", "model.embed_tokens")


@dataclass(frozen=True, slots=True)
class LoraGGUF:
    """A LoRA whose header has been read.

    pairs: the changed layer, as its model calls it ("model.layers.0.self_attn.q_proj"), to its two factors in the
    file, a [rank, in] and b [out, rank]. named: tensors that have a LoRA's usual names already. alpha: None when
    the product of the factors is added as it is.
    """

    file: GGUFFile
    pairs: Mapping[str, tuple[TensorInfo, TensorInfo]]
    named: tuple[str, ...]
    alpha: float | None
    family: Family | None

    def is_permuted(self, layer: str) -> bool:
        """Whether the rows of `layer` are in llama.cpp's order, so that the number of heads is needed."""
        permuted = self.family is not None and self.family.permuted
        return permuted and QUERY_KEY.match(f"{layer}.weight") is not None

    def factors(self, layer: str, heads: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(down [rank, in], up [out, rank]) of a layer: views of the file, or float32 where it is quantized.

        heads: of the model's attention, for layers that `is_permuted`. Raises FileFormatError when the rows are
        no even number for each head.
        """
        down, up = (self._read(info) for info in self.pairs[layer])
        if layer in EMBEDDINGS:
            return up.T, down
        if self.is_permuted(layer):
            rows = up.shape[0]
            if heads < 1 or rows % (2 * heads):
                problem = (
                    f"the LoRA for {shown(layer)} has {rows} rows, no even number for each of {heads} heads"
                )
                raise FileFormatError(
                    self.file.path, problem, "choose a LoRA that was made for this text encoder"
                )
            up = up.index_select(0, original_row_order(rows, heads))
        return down, up

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that need no other name, as `factors` gives them."""
        return {name: self._read(self.file.tensors[name]) for name in self.named}

    def _read(self, info: TensorInfo) -> torch.Tensor:
        data, dtype = self.file.read(info.name), info.format.dtype
        if dtype is not None:
            return data.view(dtype).view(info.shape)
        return dequantize(data, info.format, info.shape)


def open_lora_gguf(path: str | os.PathLike[str]) -> LoraGGUF:
    """Read the header of a GGUF file with a LoRA.

    Raises FileFormatError when the file is damaged, holds no LoRA, an adapter of another kind, or a factor
    without its partner.
    """
    file = GGUFFile(path)
    kind = text_value(file.metadata, "adapter.type")
    if kind not in (None, "lora"):
        _fail(
            file.path, f"the file is an adapter of the kind {shown(kind)}, expected a LoRA", "choose a LoRA"
        )
    architecture = text_value(file.metadata, "general.architecture")
    family = FAMILIES.get(architecture or "") if any(LLAMA_CPP.match(name) for name in file.tensors) else None
    factors: dict[str, dict[str, TensorInfo]] = {}
    named = []
    for name, info in file.tensors.items():
        match = FACTOR.match(name)
        if match is not None:
            factors.setdefault(_layer(match[1], family), {})[match[3]] = info
        elif is_lora([name]) or name.endswith((".alpha", ".dora_scale", ".reshape_weight")):
            named.append(name)
    if not factors and not is_lora(named):
        _fail(
            file.path,
            "the file holds no LoRA",
            "choose one from models/loras; models have loaders of their own",
        )
    alpha = file.metadata.get("adapter.lora.alpha")
    return LoraGGUF(
        file=file,
        pairs={layer: _pair(file.path, layer, found) for layer, found in factors.items()},
        named=tuple(named),
        alpha=float(alpha) if isinstance(alpha, (int, float)) and alpha else None,
        family=family,
    )


def _layer(stored: str, family: Family | None) -> str:
    """The layer's name in its model, without ".weight"."""
    if family is None:
        return stored.removeprefix("model.") if stored.startswith("model.diffusion_model.") else stored
    name = mapped_name(f"{stored}.weight", family.names)
    return stored if name is None else name.removesuffix(".weight")


def _pair(path: Path, layer: str, found: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    if len(found) < 2:
        _fail(path, f"the LoRA for {shown(layer)} has only one of its two factors", REDOWNLOAD)
    a, b = found["a"], found["b"]
    embedding = layer in EMBEDDINGS
    rank = a.shape[-1 if embedding else 0] if a.shape else 0
    if len(a.shape) < 2 or len(b.shape) < 2 or b.shape[1] != rank:
        _fail(path, f"the factors of the LoRA for {shown(layer)} are {a.shape} and {b.shape}", REDOWNLOAD)
    return a, b


def _fail(path: Path, problem: str, hint: str) -> NoReturn:
    raise FileFormatError(path, problem, hint)
