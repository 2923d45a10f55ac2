"""What a model file holds, from its header alone: not one byte of a tensor is read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import FileFormatError, SnugError
from ..readers.activation_keys import has_activations
from ..readers.conventions import OWN, recognise
from ..readers.core_quant import has_core_formats
from ..readers.diffusers_layout import component_folder, read_config, weights_file
from ..readers.diffusers_names import to_original_names
from ..readers.diffusion_tables import CONTROLNET, LORA, VAE, VAE_DECODER, VISION_TOWER
from ..readers.gguf_file import GGUFFile, looks_like_gguf
from ..readers.gguf_values import REDOWNLOAD
from ..readers.lora_names import FACTOR
from ..readers.model_kind import VISION_TYPES, is_text_encoder, text_value
from ..readers.repairs import (
    diffusion_names,
    drop_conv_ones,
    original_shape,
    restore_leading_ones,
    unfold_conv3d,
)
from ..readers.safetensors_file import SafetensorsFile
from ..readers.sharded_safetensors import ShardedSafetensors
from ..writers.architecture import detect_architecture
from .scaled_keys import stored_weights
from .stored import CHECKPOINT, DIFFUSION_MODEL, FOLDER, SINGLE_FILE, FileContents, StoredWeight

# What quantized weights are in the eyes of ComfyUI's model detection, as when they are loaded.
UNDECIDED = torch.bfloat16


def read_header(path: str | os.PathLike[str]) -> FileContents:
    """What a GGUF or safetensors file, or a folder in diffusers' layout, holds.

    Raises FileFormatError when it is damaged, or quantized in a way that Snug refuses.
    """
    if os.path.isdir(path):
        folder = component_folder(Path(path))
        read_config(folder)
        weights = weights_file(folder)
        file = ShardedSafetensors(weights) if weights.suffix == ".json" else SafetensorsFile(weights)
        return _of_safetensors(file, FOLDER)
    if looks_like_gguf(path):
        return _of_gguf(GGUFFile(path))
    return _of_safetensors(SafetensorsFile(path), SINGLE_FILE)


def original_tensors(contents: FileContents) -> dict[str, torch.Tensor] | None:
    """The diffusion model's tensors without content (device "meta"), by the names of its reference code.

    None where the file does not tell a shape. Raises FileFormatError when parts of a fused layer are missing.
    """
    tensors = {}
    for weight in contents.weights:
        if weight.shape is None:
            return None
        tensors[weight.name] = torch.empty(weight.shape, dtype=weight.dtype or UNDECIDED, device="meta")
    try:
        named = to_original_names(tensors)
    except SnugError as error:
        raise FileFormatError(contents.path, str(error).removesuffix("."), REDOWNLOAD) from error
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def architecture_of(contents: FileContents) -> str | None:
    """As `general.architecture` of a GGUF file names it: by the tensors, else by what the file says; None: unknown.

    Raises FileFormatError when parts of a fused layer are missing.
    """
    found = detect_architecture({weight.name for weight in contents.weights})
    if found is None and contents.is_diffusion_model and (tensors := original_tensors(contents)) is not None:
        found = detect_architecture(tensors)
    if found is None:
        named = contents.metadata.get("general.architecture")
        return named if isinstance(named, str) and named.isidentifier() else None
    return found


def _of_gguf(file: GGUFFile) -> FileContents:
    kind = _kind(file.tensors.keys(), file.metadata)
    shapes = {name: original_shape(file, info) for name, info in file.tensors.items()}
    names = _model_names(kind, file.tensors)
    if kind in (DIFFUSION_MODEL, CHECKPOINT):
        repaired = {name: shapes[stored] for name, stored in names.items()}
        unfold_conv3d(repaired)
        drop_conv_ones(repaired)
        restore_leading_ones(repaired)
        shapes.update({stored: repaired[name] for name, stored in names.items()})

    def weight(name: str, stored: str) -> StoredWeight:
        info = file.tensors[stored]
        return StoredWeight(
            name, info.format.name, shapes[stored], info.elements, info.nbytes, info.format.dtype
        )

    weights = tuple(weight(name, stored) for name, stored in names.items())
    own = set(names.values())
    size = file.path.stat().st_size
    return FileContents(
        path=str(file.path),
        container=f"GGUF version {file.version}",
        kind=kind,
        convention="GGUF",
        weights=weights,
        companions=tuple(weight(name, name) for name in file.tensors if name not in own),
        metadata=file.metadata,
        file_bytes=size,
        header_bytes=min((info.offset for info in file.tensors.values()), default=size),
    )


def _of_safetensors(file: SafetensorsFile, container: str) -> FileContents:
    # Not `recognise` for ComfyUI's formats: it reads the descriptions beside the weights.
    core = OWN if has_activations(file) else "core"
    convention = core if has_core_formats(file) else recognise(file).name
    stored = {weight.name: weight for weight in stored_weights(file)}
    kind = _kind(stored.keys(), file.metadata)
    names = _model_names(kind, stored)
    own = set(names.values())
    tensor_bytes = sum(info.nbytes for info in file.tensors.values())
    sharded = isinstance(file, ShardedSafetensors)
    size = tensor_bytes if sharded else file.path.stat().st_size
    return FileContents(
        path=str(file.path),
        container=container,
        kind=kind,
        convention=convention,
        weights=tuple(_renamed(stored[old], new) for new, old in names.items()),
        companions=tuple(weight for name, weight in stored.items() if name not in own),
        metadata=file.metadata,
        file_bytes=size,
        header_bytes=None if sharded else size - tensor_bytes,
    )


def _renamed(weight: StoredWeight, name: str) -> StoredWeight:
    return StoredWeight(name, weight.format, weight.shape, weight.weights, weight.nbytes, weight.dtype)


def _model_names(kind: str, stored: Mapping[str, Any]) -> dict[str, str]:
    """Name to stored name of the tensors that the summary is about."""
    return (
        diffusion_names(stored) if kind in (DIFFUSION_MODEL, CHECKPOINT) else {name: name for name in stored}
    )


def _kind(names: Collection[str], metadata: Mapping[str, Any]) -> str:
    """What sort of model has these tensors: names decide before the metadata does."""
    type_ = text_value(metadata, "general.type")
    if type_ == "adapter" or any(LORA.match(name) or FACTOR.match(name) for name in names):
        return "LoRA"
    if type_ in VISION_TYPES or any(VISION_TOWER.match(name) for name in names):
        return "vision part of a text encoder"
    if is_text_encoder(names):
        return "text encoder"
    if any(CONTROLNET.match(name) for name in names):
        return "ControlNet"
    if any(VAE_DECODER.match(name) for name in names) and all(VAE.match(name) for name in names):
        return "VAE"
    own = diffusion_names(names)
    if not own:
        return "model without diffusion model"
    return CHECKPOINT if len(own) < len(names) else DIFFUSION_MODEL
