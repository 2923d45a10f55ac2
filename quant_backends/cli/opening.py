"""Model files as the commands see them: names and weights, packed or plain, mapped and not read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..inspection.header import architecture_of, read_header
from ..inspection.stored import FileContents
from ..kernels.dequantize import dequantize_packed
from ..memory.spill import spill
from ..quantization import LayerInfo
from ..quantization.layers import EXPERTS
from ..readers.conventions import open_quantized_safetensors
from ..readers.diffusers_folder import open_diffusers_folder
from ..readers.diffusers_names import to_original_names
from ..readers.diffusion_gguf import load_diffusion_gguf
from ..readers.gguf_file import GGUFFile
from ..readers.repairs import diffusion_names
from ..readers.text_encoder_gguf import open_text_encoder_gguf
from ..readers.text_encoder_safetensors import open_text_encoder_safetensors
from ..readers.text_encoder_tables import DIRECT_TENSORS
from ..writers.plan import MAX_DIMS, MAX_SMALL, stored_shape
from ..writers.precision import RULES, PrecisionRules

Weight: TypeAlias = "PackedTensor | torch.Tensor"
TEXT_ENCODER = "text encoder"


@dataclass(frozen=True, slots=True)
class OpenModel:
    """tensors: by the names that ComfyUI's model has, nearly all views of the file. contents: what its header says.

    architecture: as `general.architecture` of a GGUF file names it, None when it is not known.
    """

    tensors: Mapping[str, Weight]
    contents: FileContents
    architecture: str | None

    @property
    def is_text_encoder(self) -> bool:
        return self.contents.kind == TEXT_ENCODER

    @property
    def rules(self) -> PrecisionRules:
        """What the architecture asks of a GGUF file."""
        return RULES.get(self.architecture or "", PrecisionRules())

    def layers(self, gguf: bool) -> list[LayerInfo]:
        """The matrices and kernels named "….weight", as quantization takes them.

        gguf: for a GGUF file, where they have the shape that they are stored in, and so some kernels are matrices; what
        such files always store in full precision is left out.
        """
        found = []
        for name, value in self.tensors.items():
            if not name.endswith(".weight") or len(value.shape) < 2:
                continue
            shape, dtype = (
                tuple(value.shape),
                torch.bfloat16 if isinstance(value, PackedTensor) else value.dtype,
            )
            if gguf:
                full = math.prod(shape) <= MAX_SMALL or len(shape) > MAX_DIMS or self.rules.is_full(name)
                direct = self.is_text_encoder and DIRECT_TENSORS.match(name)
                if full or direct or self.rules.is_dropped(name):
                    continue
                shape, dtype = stored_shape(shape, self.rules), _half(dtype)
            found.append(LayerInfo(name.removesuffix(".weight"), shape, _kind(name, shape), dtype))
        return found


def open_model(path: str | os.PathLike[str]) -> OpenModel:
    """The diffusion model or text encoder of a file or folder.

    Raises FileFormatError when it is damaged or refused, SnugError when it is something else, such as a LoRA.
    """
    if not os.path.exists(path):
        raise SnugError(f"{path} does not exist; check the path.")
    contents = read_header(path)
    if not contents.is_diffusion_model and contents.kind != TEXT_ENCODER:
        raise SnugError(
            f"{path} is a {contents.kind}; only diffusion models and text encoders can be quantized."
        )
    tensors = _text_encoder(path) if contents.kind == TEXT_ENCODER else _diffusion_model(path)
    return OpenModel(tensors, contents, architecture_of(contents))


def open_tensors(path: str | os.PathLike[str]) -> Mapping[str, Weight]:
    """The tensors of any model file: by ComfyUI's names for diffusion models and text encoders, else by their own."""
    contents = read_header(path)
    if contents.is_diffusion_model or contents.kind == TEXT_ENCODER:
        return open_model(path).tensors
    if contents.convention != "GGUF":
        return open_quantized_safetensors(path).state_dict
    file = GGUFFile(path)
    return {
        name: PackedTensor(file.read(name), info.format, info.shape) for name, info in file.tensors.items()
    }


def decoded(value: Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight as numbers."""
    return dequantize_packed(value, dtype) if isinstance(value, PackedTensor) else value.to(dtype)


def spilled(value: Weight, folder: Path) -> Weight:
    """The same weight, from any device, in a temporary file in `folder` that nobody sees, mapped into memory.

    A file starts with the sizes of all that is in it: so they are known, and memory holds a few weights at most.
    """
    purpose = ("Writing the file", "write to another disk")
    if isinstance(value, torch.Tensor):
        return spill([value], folder, *purpose)[0]
    names = list(value.parts)
    data, *parts = spill([value.data, *value.parts.values()], folder, *purpose)
    return PackedTensor(data, value.format, value.shape, dict(zip(names, parts, strict=True)))


def format_name(value: Weight) -> str:
    """What the weight is stored as, for people."""
    return value.format.name if isinstance(value, PackedTensor) else str(value.dtype).removeprefix("torch.")


def check_target(path: str, source: str, overwrite: bool) -> Path:
    """The file to write. Raises SnugError when it exists and may not be replaced, or cannot be written at all."""
    target = Path(path)
    if not target.parent.is_dir():
        raise SnugError(f"The folder {target.parent} does not exist; create it first.")
    if target.exists() and os.path.samefile(target, source):
        raise SnugError(f"{target} is the file that is read; write to another name.")
    if target.exists() and not overwrite:
        raise SnugError(f"{target} exists already; choose another name, or pass --overwrite to replace it.")
    return target


def _diffusion_model(path: str | os.PathLike[str]) -> Mapping[str, Weight]:
    if os.path.isdir(path):
        return open_diffusers_folder(path).state_dict
    if _is_gguf(path):
        return load_diffusion_gguf(path).state_dict
    stored = open_quantized_safetensors(path).state_dict
    return to_original_names({name: stored[old] for name, old in diffusion_names(stored).items()})


def _text_encoder(path: str | os.PathLike[str]) -> Mapping[str, Weight]:
    open_file: Any = open_text_encoder_gguf if _is_gguf(path) else open_text_encoder_safetensors
    return {name: _unwrapped(value) for name, value in open_file(path).state_dict().items()}


def _unwrapped(value: Weight) -> Weight:
    """Text encoders are opened with 16-bit matrices in the place of packed ones; they are not quantized."""
    if not isinstance(value, PackedTensor) or not isinstance(value.format, type):
        return value
    dtype = value.format.dtype
    return value if dtype is None else value.data.view(torch.uint8).view(-1).view(dtype).view(value.shape)


def _is_gguf(path: str | os.PathLike[str]) -> bool:
    return os.path.isfile(path) and read_header(path).convention == "GGUF"


def _kind(name: str, shape: tuple[int, ...]) -> Any:
    if len(shape) > 2:
        return "experts" if EXPERTS in name and len(shape) == 3 else "conv"
    is_table = name.endswith(("embed_tokens.weight", "shared.weight", "token_embedding.weight"))
    return "embedding" if is_table else "linear"


def _half(dtype: torch.dtype) -> torch.dtype:
    """What a matrix takes in a GGUF file when it is not quantized."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
