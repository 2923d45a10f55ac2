"""From a diffusion-model file to ComfyUI's MODEL."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.sd
import comfy.utils
import torch

from ...quant_backends.core.errors import FileFormatError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.readers import LoadedTensors, load_diffusion_gguf
from ...quant_backends.readers.diffusion_safetensors import load_diffusers_folder, load_diffusion_safetensors
from ...quant_backends.readers.diffusion_tables import DIRECT_WEIGHTS
from ...quant_backends.readers.gguf_file import looks_like_gguf
from ...quant_backends.readers.model_kind import refuse_other_kinds
from ...quant_backends.readers.safetensors_file import SafetensorsFile
from ...quant_backends.readers.sharded_safetensors import is_part
from ...quant_backends.registry import summary_for_tooltip
from .compat import flux_qk_norm, supported_arguments
from .core_errors import refused_as, summary
from .core_formats import is_for_core, is_plain
from .folders import files_of
from .layout import pack
from .operations import build_operations
from .packed_module import LoadSettings, set_compute_dtype
from .patcher import adopt
from .provenance import note_sources, with_recipe
from .quantize_on_load import AS_IN_FILE, quantize_tensors

__all__ = [
    "COMPUTE_DTYPES",
    "UNDECIDED_DTYPE",
    "format_summary",
    "ignore",
    "load_diffusion_model",
    "model_config",
    "open_tensors",
    "summary_for_tooltip",
]

logger = logging.getLogger("snug")

COMPUTE_DTYPES = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Packed weights show this dtype while ComfyUI chooses the model's: bfloat16 lets it take the one that the
# architecture prefers on this device (float16 would be taken as the file's own wish).
UNDECIDED_DTYPE = torch.bfloat16


def load_diffusion_model(
    path: str, compute_dtype: str = "auto", quantize: str = AS_IN_FILE, disable_dynamic: bool = False
) -> Any:
    """Load a diffusion model: quantized weights stay packed; what ComfyUI alone knows, its own loader takes.

    path: a GGUF or safetensors file of any convention, or a folder in diffusers' layout.
    compute_dtype: a key of COMPUTE_DTYPES. quantize: AS_IN_FILE, or the target for weights that are not quantized in
    the file, which are read and quantized one at a time. disable_dynamic: core asks for it when a model must not use
    dynamic VRAM (torch.compile, hooks).
    Returns a ModelPatcher. Raises FileFormatError when the file is damaged or no diffusion model that this
    ComfyUI knows.
    """
    # Two passes over the bytes: reading (most is only mapped, some is decoded) and building the model.
    bar = comfy.utils.ProgressBar(2 * sum(os.path.getsize(file) for file in files_of(path)))
    recipe = None
    if quantize == AS_IN_FILE:
        tensors = open_tensors(path, lambda done, _total: bar.update_absolute(done))
    elif (tensors := open_tensors(path, plain=True)) is not None:
        update = part_of(bar)
        found, recipe = quantize_tensors(tensors.state_dict, quantize, DIRECT_WEIGHTS, update)
        tensors = replace(tensors, state_dict=found)
    patcher = (
        _load_with_core(path, disable_dynamic)
        if tensors is None
        else _build(path, tensors, LoadSettings(on_weight=bar.update), disable_dynamic)
    )
    bar.update_absolute(bar.total)
    dtype = COMPUTE_DTYPES[compute_dtype]
    if dtype is not None:
        adopt(patcher).set_model_compute_dtype(dtype)  # plain models, too: see its unpatch_model
    model = patcher.model
    set_compute_dtype(model, dtype or model.manual_cast_dtype or model.get_dtype())
    # How newer ComfyUI builds this model again when it needs one without dynamic VRAM.
    patcher.cached_patcher_init = (load_diffusion_model, (path, compute_dtype, quantize))
    note_sources(patcher, [path])
    if recipe is not None:
        with_recipe(patcher, recipe)
    return patcher


def open_tensors(
    path: str, progress: Callable[[int, int], None] | None = None, plain: bool = False
) -> LoadedTensors | None:
    """The tensors of a diffusion model under ComfyUI's names; None for files that ComfyUI's own loader takes.

    progress: called with (bytes done, bytes in all). plain: open also what is not quantized. Raises FileFormatError as
    `load_diffusion_model` does.
    """
    if os.path.isdir(path):
        return load_diffusers_folder(path, flux_qk_norm(), progress)
    if is_part(path):  # its folder is the model
        return load_diffusers_folder(os.path.dirname(path), flux_qk_norm(), progress)
    if looks_like_gguf(path):
        return load_diffusion_gguf(path, flux_qk_norm(), progress)
    file = SafetensorsFile(path)
    refuse_other_kinds(file.path, file.tensors, file.metadata)
    if is_for_core(file) and not (plain and is_plain(file)):
        return None
    return load_diffusion_safetensors(file, flux_qk_norm(), progress)


def _load_with_core(path: str, disable_dynamic: bool) -> Any:
    options = supported_arguments(comfy.sd.load_diffusion_model, disable_dynamic=disable_dynamic)
    with refused_as(
        lambda error: FileFormatError(
            path,
            f"ComfyUI cannot load this file as a diffusion model ({summary(error)})",
            "check that it is one, and complete; text encoders, VAEs, LoRAs and checkpoints have loaders of their own",
        )
    ):
        return comfy.sd.load_diffusion_model(path, **options)


def _build(path: str, tensors: LoadedTensors, settings: LoadSettings, disable_dynamic: bool) -> Any:
    logger.info("%s: %s", os.path.basename(path), format_summary(tensors))
    state_dict = {
        name: pack(tensor, UNDECIDED_DTYPE) if isinstance(tensor, PackedTensor) else tensor
        for name, tensor in tensors.state_dict.items()
    }
    options = supported_arguments(
        comfy.sd.load_diffusion_model_state_dict,
        metadata=model_config(tensors),
        disable_dynamic=disable_dynamic,
    )
    with refused_as(
        lambda error: _unsupported(path, tensors, f"its tensors do not fit the model ({summary(error)})")
    ):
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state_dict, model_options={"custom_operations": build_operations(settings)}, **options
        )
    if patcher is None:
        raise _unsupported(path, tensors, "its tensors match none of the models that this ComfyUI knows")
    settings.on_weight = ignore
    return adopt(patcher)


def part_of(bar: Any) -> Callable[[float], None]:
    """Progress of the first of a load's two passes, in parts of it."""
    done = 0.0

    def update(part: float) -> None:
        nonlocal done
        done += part
        bar.update_absolute(int(done * bar.total / 2))

    return update


def ignore(_nbytes: int) -> None:
    """Progress of a load that is over."""


def model_config(tensors: LoadedTensors) -> dict[str, str] | None:
    """Model settings that the file carries (LTX-Video writes its JSON under `config`)."""
    config = tensors.metadata.get("config")
    return {"config": config} if isinstance(config, str) else None


def format_summary(tensors: LoadedTensors) -> str:
    counts = ", ".join(f"{count} x {name}" for name, count in sorted(tensors.format_counts.items()))
    return f"{tensors.kind}; tensors: {counts}"


def _unsupported(path: str, tensors: LoadedTensors, problem: str) -> FileFormatError:
    return FileFormatError(
        path,
        f"this file ({tensors.kind}) cannot be used as a diffusion model: {problem}",
        "update ComfyUI if the model is newer than it, or choose a diffusion model of a supported architecture",
    )
