"""Open the vision part (mmproj) of a text encoder and give its tensors ComfyUI's names and shapes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.errors import FileFormatError
from ..core.packed import PackedTensor
from ..kernels.dequantize import dequantize, dequantize_packed
from .gguf_file import GGUFFile
from .gguf_values import shown
from .model_kind import text_value
from .text_encoder_gguf import FAULTY, SUFFIX, as_stored, mapped_name
from .text_encoder_tables import (
    DEEPSTACK,
    PROJECTOR_KEYS,
    SECOND_PATCH,
    VISION_FAMILIES,
    WIDENING,
    VisionFamily,
)

Tensor = PackedTensor | torch.Tensor


@dataclass(frozen=True, slots=True)
class VisionGGUF:
    """A vision part whose header has been read.

    projector: its name in the metadata, a key of VISION_FAMILIES. width: size of the embeddings it makes,
    which is the hidden size of the text encoder it belongs to.
    """

    file: GGUFFile
    projector: str
    width: int

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.file.tensors.values())

    def state_dict(self, progress: Callable[[int], None] | None = None) -> dict[str, Tensor]:
        """Name to tensor; query, key and value are joined without decoding where their formats agree."""
        family, taps = VISION_FAMILIES[self.projector], self._taps()
        tensors: dict[str, Tensor] = {}
        for name, info in self.file.tensors.items():
            data = self.file.read(name)
            if name == SECOND_PATCH:
                continue
            if f"{name}.1" == SECOND_PATCH and SECOND_PATCH in self.file.tensors:
                tensor: Tensor = self._patch_embedding(name)
            elif len(info.shape) > 2:
                tensor = dequantize(data, info.format, info.shape, torch.float32)
            else:
                tensor = as_stored(new_name(name, family, taps), info, data)
            new = new_name(name, family, taps)
            if new in family.shifted and isinstance(tensor, torch.Tensor):
                tensor = tensor - 1
            tensors[new] = tensor
            if progress is not None:
                progress(info.nbytes)
        return dict(_joined_attention(self.file.path, _widening_first(tensors)))

    def _patch_embedding(self, name: str) -> torch.Tensor:
        """(out, in, h, w) twice to (out, in, 2, h, w): float32."""
        slices = []
        for part in (name, SECOND_PATCH):
            info = self.file.tensors[part]
            slices.append(dequantize(self.file.read(part), info.format, info.shape, torch.float32))
        if slices[0].shape != slices[1].shape:
            raise FileFormatError(
                self.file.path,
                f"the two halves of the patch embedding have the shapes {tuple(slices[0].shape)} and "
                f"{tuple(slices[1].shape)}, expected the same",
                FAULTY,
            )
        return torch.stack(slices, dim=2)

    def _taps(self) -> list[int]:
        """Layers after which a deepstack merger taps, ascending."""
        matches = (SUFFIX.match(name) for name in self.file.tensors)
        found = (DEEPSTACK.match(match[1]) for match in matches if match)
        return sorted({int(match[1]) for match in found if match})


def open_vision_gguf(path: str | os.PathLike[str]) -> VisionGGUF:
    """Read the header of an mmproj file.

    Raises FileFormatError when the file is damaged, no vision part, or one that no text encoder of ComfyUI's
    uses.
    """
    file = GGUFFile(path)
    projector = next((value for key in PROJECTOR_KEYS if (value := text_value(file.metadata, key))), None)
    family = VISION_FAMILIES.get(projector or "")
    named, axis = family.output if family else ("", 0)
    output = file.tensors.get(named)
    if not any(name.startswith("v.blk.") for name in file.tensors) or (
        family is not None and (output is None or len(output.shape) != 2)
    ):
        raise FileFormatError(
            file.path,
            "the file is not the vision part (mmproj) of a text encoder",
            "choose the mmproj file that was published with the text encoder",
        )
    if projector is None or output is None:
        raise FileFormatError(
            file.path,
            f"the file is a vision part of the kind {shown(projector or 'not named')}, "
            f"expected one of {', '.join(VISION_FAMILIES)}",
            "choose the mmproj of a Qwen2.5-VL, Qwen3-VL or Gemma 3 text encoder, or none",
        )
    return VisionGGUF(file, projector, output.shape[axis])


def new_name(name: str, family: VisionFamily, taps: list[int]) -> str:
    """ComfyUI's name of a stored tensor; taps: layers of the deepstack mergers, ascending."""
    match = SUFFIX.match(name)
    tap = DEEPSTACK.match(match[1]) if match else None
    if match and tap and family.deepstack:
        number = taps.index(int(tap[1]))
        return f"{family.prefix}deepstack_merger_list.{number}.{family.deepstack[tap[2]]}.{match[2]}"
    return family.prefix + (mapped_name(name, family.names) or name)


def _widening_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers of a block in their order, of which the first has more rows than columns."""
    swapped = {}
    for name, tensor in tensors.items():
        match = WIDENING.match(name)
        if match and len(tensor.shape) == 2 and tensor.shape[0] < tensor.shape[1]:
            for suffix in ("weight", "bias"):
                first, second = (f"{match[1]}{part}.{suffix}" for part in ("fc1", "fc2"))
                swapped |= {first: second, second: first}
    return {swapped.get(name, name): tensor for name, tensor in tensors.items()}


def _joined_attention(path: Path, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`attn.q`, `attn.k` and `attn.v` as one `attn.qkv`; everything else as it is."""
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if module.endswith(".attn.q"):
            stem = module.removesuffix("q")
            parts = [tensors[key] for letter in "qkv" if (key := f"{stem}{letter}.{suffix}") in tensors]
            if len(parts) != 3 or len({tuple(part.shape[1:]) for part in parts}) > 1:
                raise FileFormatError(path, f"{shown(name)} has no key and value that fit", FAULTY)
            yield f"{stem}qkv.{suffix}", _concatenated(parts)
        elif not module.endswith((".attn.k", ".attn.v")):
            yield name, tensor


def _concatenated(parts: list[Tensor]) -> Tensor:
    packed = [part for part in parts if isinstance(part, PackedTensor)]
    if len(packed) == len(parts) and len({part.format for part in packed}) == 1:
        rows = sum(part.shape[0] for part in packed)
        data = torch.cat([part.data for part in packed])
        return PackedTensor(data, packed[0].format, (rows, *packed[0].shape[1:]))
    return torch.cat([dequantize_packed(part) if isinstance(part, PackedTensor) else part for part in parts])
