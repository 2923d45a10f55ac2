"""Open a text encoder in a safetensors file of any convention.

Opening reads the header and what describes quantized layers; weights are views of the mapped file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.packed import PackedTensor
from ..formats.plain import HALVES
from ..formats.scaled import scaled_format
from ..kernels.dequantize import dequantize_packed
from .clip_names import hugging_face_names, split_attention, split_shapes
from .conventions import Convention, load_quantized, recognise
from .core_quant import only_layers
from .fp8_keys import FLOAT8
from .quanto_keys import PACKED
from .safetensors_file import SafetensorsFile
from .sharded_safetensors import refuse_part
from .text_encoder_kinds import projection_names, refuse_other_kinds
from .text_encoder_tables import DIRECT_TENSORS, FROM_HIDDEN, TO_HIDDEN


@dataclass(frozen=True, slots=True)
class TextEncoderSafetensors:
    """A text encoder whose header has been read.

    convention: how the file is quantized. shapes: logical shapes by ComfyUI's names.
    """

    file: SafetensorsFile
    convention: Convention
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def for_core_only(self) -> bool:
        """Whether only ComfyUI can decode the weights."""
        return self.convention.core and not self.convention.loaders

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.file.tensors.values())

    def state_dict(
        self, progress: Callable[[int], None] | None = None
    ) -> dict[str, PackedTensor | torch.Tensor]:
        """Name to tensor. Matrices are packed views of the file, whatever they are stored in, unless they are
        float32; small ones that ComfyUI does not use through an operation are decoded.

        progress: called once, with the bytes of the file. Raises FileFormatError when the parts of a quantized
        weight do not fit together.
        """
        tensors = {
            new: as_needed(new, part)
            for name, tensor in hugging_face_names(_put_together(self.file)).items()
            for new, part in split_attention(name, tensor)
        }
        if progress is not None:
            progress(self.nbytes)
        return tensors


def open_text_encoder_safetensors(path: str | os.PathLike[str]) -> TextEncoderSafetensors:
    """Read the header of a text encoder's safetensors file.

    Raises FileFormatError when the file is damaged, one part of several, quantized in a way that Snug refuses, or
    something else (a LoRA, a diffusion model, a whole checkpoint, a VAE).
    """
    refuse_part(path)
    file = SafetensorsFile(path)
    refuse_other_kinds(file.path, file.tensors)
    projection = projection_names(file.tensors)
    if projection:
        file = only_layers(file, projection)
    convention = recognise(file)
    if convention.core and not convention.loaders:
        shapes = {name: _unpacked_shape(file, name) for name in file.tensors}
    elif convention.loaders:
        shapes = {name: tuple(value.shape) for name, value in _put_together(file).items()}
    else:
        shapes = {name: info.shape for name, info in file.tensors.items()}
    return TextEncoderSafetensors(file, convention, split_shapes(hugging_face_names(shapes)))


def _put_together(file: SafetensorsFile) -> dict[str, PackedTensor | torch.Tensor]:
    return load_quantized(file, _shapes_of_groups(file)).state_dict


def as_needed(name: str, tensor: PackedTensor | torch.Tensor) -> PackedTensor | torch.Tensor:
    """16-bit and float8 matrices count as packed: ComfyUI would copy plain ones to float32, the dtype its text
    encoders calculate in."""
    if DIRECT_TENSORS.match(name):
        return dequantize_packed(tensor) if isinstance(tensor, PackedTensor) else _readable(tensor)
    if isinstance(tensor, PackedTensor):
        return tensor
    if tensor.dim() != 2 or not name.endswith(".weight"):
        return _readable(tensor)
    shape = (tensor.shape[0], tensor.shape[1])
    if tensor.dtype in FLOAT8:
        fmt = scaled_format(f"{FLOAT8[tensor.dtype]}-tensor")
        return PackedTensor(tensor, fmt, shape, {"scale": torch.ones(1)})
    fmt = HALVES.get(tensor.dtype)
    return PackedTensor(tensor.view(torch.uint8).view(-1), fmt, shape) if fmt else tensor


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """torch calculates nothing in float8."""
    return tensor.float() if tensor.dtype in FLOAT8 else tensor


def _unpacked_shape(file: SafetensorsFile, name: str) -> tuple[int, ...]:
    """Two weights a byte is what ComfyUI's 4-bit formats have in common."""
    info = file.tensors[name]
    is_packed = info.dtype is torch.uint8 and name.endswith(".weight") and len(info.shape) == 2
    return (info.shape[0], 2 * info.shape[1]) if is_packed else info.shape


def _shapes_of_groups(file: SafetensorsFile) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that quanto stores in groups, which their layers' names and the model's width tell."""
    widths = [
        info.shape[0]
        for name, info in file.tensors.items()
        if name.endswith("norm.weight") and len(info.shape) == 1 and info.shape[0]
    ]
    width, shapes = max(widths, default=0), {}
    for name in (name.removesuffix(PACKED) for name in file.tensors if name.endswith(PACKED)):
        scale, data = file.tensors.get(f"{name}._scale"), file.tensors[name + PACKED]
        count = math.prod(scale.shape) * data.shape[-1] if scale is not None and data.shape else 0
        if not count or not width or count % width:
            continue
        if name.endswith(TO_HIDDEN):
            shapes[name] = (width, count // width)
        elif name.endswith(FROM_HIDDEN):
            shapes[name] = (count // width, width)
    return shapes
