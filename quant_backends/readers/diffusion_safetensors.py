"""Load the diffusion model of a quantized safetensors file or a diffusers folder, under the names that ComfyUI's
detection expects."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from ..core.errors import FileFormatError, SnugError
from ..core.packed import PackedTensor
from ..kernels.dequantize import dequantize_packed
from .conventions import load_quantized
from .diffusers_folder import open_diffusers_folder
from .diffusers_names import to_original_names
from .diffusion_gguf import LoadedTensors
from .diffusion_tables import DIRECT_WEIGHTS
from .gguf_values import REDOWNLOAD
from .model_kind import refuse_other_kinds
from .repairs import diffusion_names, rename_qk_norms
from .safetensors_file import SafetensorsFile

QKNorm = Literal["scale", "weight"] | None
Tensors = dict[str, PackedTensor | torch.Tensor]


def load_diffusion_safetensors(
    file: SafetensorsFile,
    qk_norm: QKNorm = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedTensors:
    """The diffusion model of an open file of a quantized convention, under reference or diffusers' names.

    qk_norm, progress: as for `load_diffusion_gguf`.
    Raises FileFormatError when the file is inconsistent, or is a text encoder, LoRA, VAE or ControlNet.
    """
    loaded = load_quantized(file)
    refuse_other_kinds(file.path, loaded.state_dict.keys(), file.metadata)
    names = diffusion_names(loaded.state_dict)
    try:
        tensors = to_original_names(
            {name: loaded.state_dict[stored] for name, stored in names.items()}, progress
        )
    except FileFormatError:
        raise
    except SnugError as error:
        raise FileFormatError(file.path, str(error).removesuffix("."), REDOWNLOAD) from error
    kind = f"safetensors, {loaded.convention.name}"
    return LoadedTensors(settle(tensors, qk_norm), kind, loaded.metadata, loaded.format_counts)


def load_diffusers_folder(
    path: str | os.PathLike[str],
    qk_norm: QKNorm = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedTensors:
    """The denoiser of a folder in diffusers' layout; arguments and errors as above and of `open_diffusers_folder`."""
    loaded = open_diffusers_folder(path, progress)
    kind = f"diffusers folder, {loaded.convention.name}"
    return LoadedTensors(settle(loaded.state_dict, qk_norm), kind, loaded.metadata, loaded.format_counts)


def settle(tensors: Mapping[str, PackedTensor | torch.Tensor], qk_norm: QKNorm) -> Tensors:
    """Decodes what ComfyUI's models read without its operations; names query and key norms as it does."""
    ready = {name: _dense(value) if _is_direct(name, value) else value for name, value in tensors.items()}
    return rename_qk_norms(ready, qk_norm) if qk_norm else ready


def _is_direct(name: str, value: PackedTensor | torch.Tensor) -> bool:
    return len(value.shape) < 2 or not name.endswith(".weight") or DIRECT_WEIGHTS.match(name) is not None


def _dense(value: PackedTensor | torch.Tensor) -> torch.Tensor:
    return dequantize_packed(value) if isinstance(value, PackedTensor) else value
