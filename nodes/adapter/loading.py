"""From a diffusion-model file to ComfyUI's MODEL."""

from __future__ import annotations

import logging
import os
from typing import Any

import comfy.sd
import comfy.utils
import torch
from safetensors import SafetensorError

from ...quant_backends.core.errors import FileFormatError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.readers import LoadedTensors, load_diffusion_gguf
from .compat import flux_qk_norm, supported_arguments
from .core_errors import is_about_the_file, summary
from .layout import pack
from .operations import build_operations
from .packed_module import LoadSettings, set_compute_dtype
from .patcher import adopt

logger = logging.getLogger("snug")

COMPUTE_DTYPES = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Packed weights show this dtype while ComfyUI chooses the model's: bfloat16 lets it take the one that the
# architecture prefers on this device (float16 would be taken as the file's own wish).
UNDECIDED_DTYPE = torch.bfloat16


def load_diffusion_model(path: str, compute_dtype: str = "auto", disable_dynamic: bool = False) -> Any:
    """Load a `.gguf` with packed weights, or any other file with ComfyUI's own loader.

    compute_dtype: a key of COMPUTE_DTYPES. disable_dynamic: core asks for it when a model must not use
    dynamic VRAM (torch.compile, hooks).
    Returns a ModelPatcher. Raises FileFormatError when the file is damaged or no diffusion model that this
    ComfyUI knows.
    """
    load = _load_gguf if path.lower().endswith(".gguf") else _load_with_core
    patcher = load(path, disable_dynamic)
    dtype = COMPUTE_DTYPES[compute_dtype]
    if dtype is not None:
        patcher.set_model_compute_dtype(dtype)
    model = patcher.model
    set_compute_dtype(model, dtype or model.manual_cast_dtype or model.get_dtype())
    # How newer ComfyUI builds this model again when it needs one without dynamic VRAM.
    patcher.cached_patcher_init = (load_diffusion_model, (path, compute_dtype))
    return patcher


def _load_with_core(path: str, disable_dynamic: bool) -> Any:
    options = supported_arguments(comfy.sd.load_diffusion_model, disable_dynamic=disable_dynamic)
    try:
        return comfy.sd.load_diffusion_model(path, **options)
    except (RuntimeError, ValueError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not is_about_the_file(error):
            raise  # out of memory, above all, which ComfyUI handles itself
        raise FileFormatError(
            path,
            f"ComfyUI cannot load this file as a diffusion model ({summary(error)})",
            "check that it is one, and complete; text encoders, VAEs, LoRAs and checkpoints have loaders of their own",
        ) from error


def _load_gguf(path: str, disable_dynamic: bool) -> Any:
    # Two passes over the bytes: reading (most is only mapped, some is decoded) and building the model.
    bar = comfy.utils.ProgressBar(2 * os.path.getsize(path))
    tensors = load_diffusion_gguf(path, flux_qk_norm(), lambda done, _total: bar.update_absolute(done))
    logger.info("%s: %s", os.path.basename(path), _format_summary(tensors))

    state_dict = {
        name: pack(tensor, UNDECIDED_DTYPE) if isinstance(tensor, PackedTensor) else tensor
        for name, tensor in tensors.state_dict.items()
    }
    settings = LoadSettings(on_weight=bar.update)
    options = supported_arguments(
        comfy.sd.load_diffusion_model_state_dict,
        metadata=_model_config(tensors),
        disable_dynamic=disable_dynamic,
    )
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state_dict, model_options={"custom_operations": build_operations(settings)}, **options
        )
    except RuntimeError as error:
        if not is_about_the_file(error):
            raise
        raise _unsupported(path, tensors, f"its tensors do not fit the model ({summary(error)})") from error
    except (
        AttributeError
    ) as error:  # core's conversion of diffusers' names calculates on the weights in place
        raise _unsupported(
            path, tensors, "its tensors have names that ComfyUI can only convert unquantized"
        ) from error
    if patcher is None:
        raise _unsupported(path, tensors, "its tensors match none of the models that this ComfyUI knows")
    bar.update_absolute(bar.total)
    settings.on_weight = _ignore
    return adopt(patcher)


def _ignore(_nbytes: int) -> None:
    """Progress of a load that is over."""


def _model_config(tensors: LoadedTensors) -> dict[str, str] | None:
    """Model settings that the file carries (LTX-Video writes its JSON under `config`)."""
    config = tensors.metadata.get("config")
    return {"config": config} if isinstance(config, str) else None


def _format_summary(tensors: LoadedTensors) -> str:
    counts = ", ".join(f"{count} x {name}" for name, count in sorted(tensors.format_counts.items()))
    return f"architecture {tensors.architecture or 'not named'}, tensors: {counts}"


def _unsupported(path: str, tensors: LoadedTensors, problem: str) -> FileFormatError:
    named = f"'{tensors.architecture}'" if tensors.architecture else "not named in the file"
    return FileFormatError(
        path,
        f"this GGUF file (architecture {named}) cannot be used as a diffusion model: {problem}",
        "update ComfyUI if the model is newer than it, or choose a diffusion model of a supported architecture",
    )
