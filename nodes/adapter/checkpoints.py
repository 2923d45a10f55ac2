"""From an all-in-one checkpoint to ComfyUI's MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...quant_backends.core.errors import FileFormatError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.readers import GGUFFile
from ...quant_backends.readers.checkpoint_names import DIFFUSION_PREFIX
from ...quant_backends.readers.checkpoint_parts import (
    CheckpointParts,
    open_checkpoint_gguf,
    open_checkpoint_safetensors,
)
from ...quant_backends.readers.diffusion_tables import DIRECT_WEIGHTS
from ...quant_backends.readers.gguf_file import looks_like_gguf
from ...quant_backends.readers.model_kind import refuse_other_kinds
from ...quant_backends.readers.safetensors_file import SafetensorsFile
from ...quant_backends.readers.sharded_safetensors import refuse_part
from ...quant_backends.readers.text_encoder_tables import DIRECT_TENSORS
from .compat import flux_qk_norm, supported_arguments
from .core_errors import refused_as, summary
from .core_formats import is_for_core, is_plain
from .layout import pack
from .loading import COMPUTE_DTYPES, UNDECIDED_DTYPE, format_summary, ignore, model_config, part_of
from .operations import build_operations
from .packed_module import LoadSettings, set_compute_dtype
from .patcher import adopt
from .provenance import note_sources, with_recipe
from .quantize_on_load import AS_IN_FILE, quantize_tensors
from .text_encoders import COMPUTE_DTYPE as ENCODER_DTYPE

logger = logging.getLogger("snug")

ALL = ("model", "clip", "vae")


def load_checkpoint(
    path: str,
    compute_dtype: str = "auto",
    quantize: str = AS_IN_FILE,
    quantize_text_encoders: str = AS_IN_FILE,
    disable_dynamic: bool = False,
    parts: tuple[str, ...] = ALL,
) -> tuple[Any, Any, Any]:
    """Load (ModelPatcher, CLIP, VAE): quantized weights stay packed, those of the VAE are decoded.

    As core's loader, a checkpoint without text encoders gives None for CLIP, one without VAE a VAE that says so when
    it is used. compute_dtype: of the diffusion model, a key of COMPUTE_DTYPES. quantize, quantize_text_encoders:
    AS_IN_FILE, or the target for weights that are not quantized in the file, which are read and quantized one at a
    time. disable_dynamic: core asks for it when a model must not use dynamic VRAM. parts: what to load, the others are
    None.
    Raises FileFormatError when the file is damaged, or no checkpoint that this ComfyUI knows.
    """
    # Two passes over the bytes: reading (most is only mapped, some is decoded) and building the models.
    bar = comfy.utils.ProgressBar(2 * os.path.getsize(path) if os.path.exists(path) else 0)
    wanted = (quantize, quantize_text_encoders)
    plain = set(wanted) != {AS_IN_FILE}
    checkpoint = _open(path, None if plain else lambda done, _total: bar.update_absolute(done), plain)
    recipes: list[dict[str, Any]] = []
    if plain and checkpoint is not None:
        checkpoint, recipes = _quantized(checkpoint, wanted, part_of(bar))
    settings = LoadSettings(on_weight=bar.update)
    model, clip, vae = _build(path, checkpoint, settings, disable_dynamic, parts)
    settings.on_weight = ignore
    if model is not None:
        dtype = COMPUTE_DTYPES[compute_dtype]
        if checkpoint is not None or dtype is not None:
            adopt(model)
        if dtype is not None:
            model.set_model_compute_dtype(dtype)
        set_compute_dtype(model.model, dtype or model.model.manual_cast_dtype or model.model.get_dtype())
        # How newer ComfyUI builds a model again when it needs one without dynamic VRAM or for another device.
        model.cached_patcher_init = (_load_patcher, (path, compute_dtype, *wanted, "model"))
    if clip is not None and checkpoint is not None:
        adopt(clip.patcher)
        set_compute_dtype(clip.cond_stage_model, ENCODER_DTYPE)
        clip.patcher.cached_patcher_init = (_load_patcher, (path, compute_dtype, *wanted, "clip"))
    if getattr(vae, "patcher", None) is not None and checkpoint is not None:
        vae.patcher.cached_patcher_init = (_load_patcher, (path, compute_dtype, *wanted, "vae"))
    for patcher, recipe in zip((model, getattr(clip, "patcher", None)), recipes or ({}, {}), strict=True):
        if patcher is not None:
            note_sources(patcher, [path])
            if recipe:
                with_recipe(patcher, recipe)
    bar.update_absolute(bar.total)
    return model, clip, vae


def _load_patcher(
    path: str,
    compute_dtype: str,
    quantize: str,
    quantize_text_encoders: str,
    part: str,
    disable_dynamic: bool = False,
) -> Any:
    wanted = (quantize, quantize_text_encoders)
    loaded = load_checkpoint(path, compute_dtype, *wanted, disable_dynamic, (part,))[ALL.index(part)]
    return loaded if part == "model" else loaded.patcher


def _open(path: str, progress: Callable[[int, int], None] | None, plain: bool) -> CheckpointParts | None:
    """The parts of a checkpoint; None for files that ComfyUI's own loader takes. plain: open also what is not
    quantized."""
    if looks_like_gguf(path):
        return open_checkpoint_gguf(GGUFFile(path), flux_qk_norm(), progress)
    refuse_part(path)
    file = SafetensorsFile(path)
    refuse_other_kinds(file.path, file.tensors, file.metadata)
    if is_for_core(file) and not (plain and is_plain(file)):
        return None
    return open_checkpoint_safetensors(file, flux_qk_norm(), progress)


def _quantized(
    checkpoint: CheckpointParts, targets: tuple[str, str], progress: Callable[[float], None]
) -> tuple[CheckpointParts, list[dict[str, Any]]]:
    """(the checkpoint with diffusion model and text encoders quantized to these targets, what was done to each)."""
    parts, recipes = [], []
    for tensors, target, direct in zip(
        (checkpoint.diffusion, checkpoint.encoders), targets, (DIRECT_WEIGHTS, DIRECT_TENSORS), strict=True
    ):
        recipe: dict[str, Any] = {}
        if target != AS_IN_FILE:
            is_encoder = direct is DIRECT_TENSORS
            update = _scaled(progress, 0.2 if is_encoder else 0.8)
            tensors, recipe = quantize_tensors(tensors, target, direct, update, is_encoder)
        parts.append(tensors)
        recipes.append(recipe)
    return replace(checkpoint, diffusion=parts[0], encoders=parts[1]), recipes


def _scaled(progress: Callable[[float], None], share: float) -> Callable[[float], None]:
    return lambda part: progress(part * share)


def _build(
    path: str,
    checkpoint: CheckpointParts | None,
    settings: LoadSettings,
    disable_dynamic: bool,
    parts: tuple[str, ...],
) -> tuple[Any, Any, Any]:
    wanted = {f"output_{part}": part in parts for part in ALL}
    wanted["embedding_directory"] = folder_paths.get_folder_paths("embeddings")
    with refused_as(lambda error: _unsupported(path, f"ComfyUI cannot load it ({summary(error)})")):
        if checkpoint is None:
            load = comfy.sd.load_checkpoint_guess_config
            options = supported_arguments(load, disable_dynamic=disable_dynamic)
            found = load(path, **wanted, **options)
        else:
            _report(path, checkpoint)
            found = _build_packed(checkpoint, settings, disable_dynamic, wanted)
    if found is None:
        raise _unsupported(path, "its tensors match none of the models that this ComfyUI knows")
    return found[:3]


def _build_packed(
    checkpoint: CheckpointParts, settings: LoadSettings, disable_dynamic: bool, wanted: Mapping[str, Any]
) -> Any:
    operations = build_operations(settings)
    state_dict = {
        name: pack(value, UNDECIDED_DTYPE if name.startswith(DIFFUSION_PREFIX) else ENCODER_DTYPE)
        if isinstance(value, PackedTensor)
        else value
        for name, value in checkpoint.state_dict().items()
    }
    load = comfy.sd.load_state_dict_guess_config
    return load(
        state_dict,
        **wanted,
        model_options={"custom_operations": operations},
        te_model_options={
            "custom_operations": operations,
            "dtype": ENCODER_DTYPE,  # of norms and biases
            "initial_device": torch.device("cpu"),  # where the file is mapped
        },
        **supported_arguments(
            load, metadata=model_config(checkpoint.source), disable_dynamic=disable_dynamic
        ),
    )


def _report(path: str, checkpoint: CheckpointParts) -> None:
    name = os.path.basename(path)
    logger.info("%s: %s", name, format_summary(checkpoint.source))
    if not checkpoint.encoders:
        logger.warning("%s holds no text encoder: load one with Load Text Encoders (Snug).", name)
    if not checkpoint.vae:
        logger.warning("%s holds no VAE: load one with Load VAE.", name)


def _unsupported(path: str, problem: str) -> FileFormatError:
    return FileFormatError(
        path,
        f"the file cannot be used as a checkpoint: {problem}",
        "update ComfyUI if the model is newer than it; text encoders, VAEs and LoRAs have loaders of their own",
    )
