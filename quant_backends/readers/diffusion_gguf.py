"""Load the diffusion model of a GGUF file under the names and shapes that ComfyUI's model detection expects."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..core.packed import PackedTensor
from ..kernels.dequantize import dequantize
from .diffusion_tables import DIRECT_WEIGHTS
from .gguf_file import GGUFFile
from .gguf_tensors import TensorInfo
from .gguf_values import shown
from .model_kind import refuse_other_kinds, text_value
from .repairs import (
    diffusion_names,
    drop_conv_ones,
    original_shape,
    rename_qk_norms,
    restore_leading_ones,
    unfold_conv3d,
)

# Position tables above this size (SD3.5's would take 1.4 GB in float32) stay or become float16: 64 MiB of
# float32.
MAX_FLOAT32_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class LoadedTensors:
    """A diffusion model as it comes out of its file.

    state_dict: model name to PackedTensor (quantized) or torch.Tensor (plain types and what had to be
        decoded); nearly all are views of the file, nothing is read until it is used.
    kind: what sort of file it was, with what it calls its architecture where it does: "GGUF, architecture flux".
    metadata: everything else the file says, decoded on look-up (`config` of LTX-Video is JSON text).
    format_counts: format name to number of tensors in the file.
    """

    state_dict: dict[str, PackedTensor | torch.Tensor]
    kind: str
    metadata: Mapping[str, Any]
    format_counts: Mapping[str, int]


def load_diffusion_gguf(
    path: str | os.PathLike[str],
    qk_norm: Literal["scale", "weight"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedTensors:
    """Open a GGUF diffusion model and repair what its writer did to names, shapes and small parameters.

    qk_norm: what the target's Flux-like blocks call the parameter of their query and key norms; None keeps
    the
        names of the file.
    progress: called after every tensor with (bytes done, bytes in all).

    Raises FileFormatError when the file is damaged, or is a text encoder, vision tower, LoRA or VAE.
    """
    file = GGUFFile(path)
    refuse_other_kinds(file.path, file.tensors.keys(), file.metadata)
    infos = {name: file.tensors[stored] for name, stored in diffusion_names(file.tensors).items()}
    tensors = load_repaired(file, infos, progress)
    return LoadedTensors(
        state_dict=rename_qk_norms(tensors, qk_norm) if qk_norm else tensors,
        kind=f"GGUF, architecture {_architecture(file)}",
        metadata=file.metadata,
        format_counts=Counter(info.format.name for info in infos.values()),
    )


def load_repaired(
    file: GGUFFile, infos: Mapping[str, TensorInfo], progress: Callable[[int, int], None] | None = None
) -> dict[str, PackedTensor | torch.Tensor]:
    """The tensors of a denoiser or ControlNet by their names in the model (`infos`), with their right shapes."""
    shapes = {name: original_shape(file, info) for name, info in infos.items()}
    unfold_conv3d(shapes)
    drop_conv_ones(shapes)
    restore_leading_ones(shapes)

    tensors: dict[str, PackedTensor | torch.Tensor] = {}
    done, total = 0, sum(info.nbytes for info in infos.values())
    for name, info in infos.items():
        tensors[name] = _load(file, info, name, shapes[name])
        done += info.nbytes
        if progress is not None:
            progress(done, total)
    return tensors


def _architecture(file: GGUFFile) -> str:
    """`general.architecture`, which is only a hint: often missing, sometimes wrong."""
    found = text_value(file.metadata, "general.architecture")
    return shown(found) if found else "not named"


def _load(file: GGUFFile, info: TensorInfo, name: str, shape: tuple[int, ...]) -> PackedTensor | torch.Tensor:
    data = file.read(info.name)
    dtype = info.format.dtype
    wanted = _dense_dtype(name, info, shape)
    if wanted is not None and wanted != dtype:
        return dequantize(data, info.format, info.shape, wanted).view(shape)
    if dtype is not None:
        return data.view(dtype).view(shape)
    return PackedTensor(data, info.format, shape)


def _dense_dtype(name: str, info: TensorInfo, shape: tuple[int, ...]) -> torch.dtype | None:
    """The dtype a tensor has to be decoded to, or None when it can stay as it is stored.

    Weights and biases go through operations that decode them. Everything else (modulation and scale tables,
    position embeddings, register tokens) is read by the models themselves, which want numbers and are
    sensitive to their precision: ComfyUI-GGUF keeps these in float32, other writers quantize them or use
    BF16.
    """
    dtype = info.format.dtype
    if dtype is not None and not dtype.is_floating_point:
        return None
    if not name.endswith((".weight", ".bias")):
        if info.elements <= MAX_FLOAT32_ELEMENTS:
            return torch.float32
        return torch.float16 if dtype is None else None
    if len(shape) <= 1:
        return None if dtype is torch.float16 else torch.float32
    return torch.float32 if dtype is None and DIRECT_WEIGHTS.match(name) else None
