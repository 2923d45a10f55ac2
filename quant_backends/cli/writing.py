"""Writing a model into a container: which weights it holds as they are, and with what description."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats.scaled_base import FLOATS
from ..quantization import Target
from ..readers.text_encoder_tables import FAMILIES
from ..writers import write_gguf, write_safetensors, write_text_encoder_gguf
from .console import progress
from .opening import OpenModel, Weight
from .text_encoders import EncoderFile, encoder_file, encoder_tensors

GGUF, SAFETENSORS = ".gguf", ".safetensors"
PROVENANCE = "snug.provenance"
# Backends whose files are of their library's own convention, though another one could hold the same weights.
BY_BACKEND = {name: name for name in ("bitsandbytes", "torchao", "quanto")}
_CHUNK = 16 << 20  # bytes


def container(target: Path) -> str:
    """GGUF or SAFETENSORS, by the name of the file to write. Raises SnugError for any other."""
    suffix = target.suffix.lower()
    if suffix not in (GGUF, SAFETENSORS):
        raise SnugError(
            f"{target} is to end in {GGUF} or {SAFETENSORS}, which says what kind of file to write."
        )
    return suffix


def check_container(target: Path, chosen: Target) -> None:
    """Raises SnugError unless the file to write can hold what is quantized to the target."""
    wanted = GGUF if chosen.backend == "gguf" else SAFETENSORS
    if container(target) != wanted:
        raise SnugError(f"{chosen.name} is stored in {wanted} files; write to {target.with_suffix(wanted)}.")


def check_encoder(target: Path, model: OpenModel, source: str, tokenizer: str | None) -> EncoderFile | None:
    """What the GGUF file of a text encoder needs besides; None for other files. Errors as of `encoder_file`."""
    if container(target) == GGUF and model.is_text_encoder:
        return encoder_file(model, source, tokenizer)
    if tokenizer is not None:
        raise SnugError("--tokenizer is for text encoders that are written as .gguf files; leave it out.")
    return None


def holds(target: Path, value: PackedTensor) -> bool:
    """Whether the container stores the weight as it is."""
    return isinstance(value.format, type) == (container(target) == GGUF)


def write_model(
    target: Path,
    tensors: Mapping[str, Weight],
    model: OpenModel,
    provenance: Mapping[str, Any],
    backend: str = "",
    encoder: EncoderFile | None = None,
) -> None:
    """Writes the file whole or not at all.

    model: what the tensors were made of. provenance: where they come from and what was done to them. backend: whose
    convention a safetensors file follows; "" takes what holds the weights. encoder: of a GGUF file of a text encoder.
    Raises SnugError when nothing holds the weights.
    """
    described = {PROVENANCE: json.dumps(provenance, sort_keys=True)}
    with progress("writing", "" if container(target) == GGUF else "B") as update:
        if encoder is not None:
            metadata = {**encoder.metadata, **described}
            weights = encoder_tensors(tensors)
            if encoder.architecture in FAMILIES:
                write_text_encoder_gguf(
                    target, weights, encoder.architecture, None, metadata=metadata, progress=update
                )
            else:
                write_gguf(
                    target,
                    weights,
                    None,
                    architecture=encoder.architecture,
                    metadata=metadata,
                    progress=update,
                )
        elif container(target) == GGUF:
            write_gguf(
                target, tensors, None, architecture=model.architecture, metadata=described, progress=update
            )
        else:
            convention = BY_BACKEND.get(backend, "")
            dtype = _common_dtype(model)
            write_safetensors(target, tensors, convention, metadata=described, dtype=dtype, progress=update)


def _common_dtype(model: OpenModel) -> torch.dtype:
    """What most matrices are stored in that are not quantized; bfloat16 where all are."""
    dtypes = Counter(
        value.dtype
        for value in model.tensors.values()
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.dtype in FLOATS
    )
    return dtypes.most_common(1)[0][0] if dtypes else torch.bfloat16


def source_description(path: str) -> dict[str, Any]:
    """Name, size and SHA-256 of the file that the weights come from; of a folder the name."""
    entry: dict[str, Any] = {"file": os.path.basename(os.path.abspath(path))}
    if os.path.isdir(path):
        return entry
    digest, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file, progress("hashing", "B") as update:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            update(file.tell(), size)
    return {**entry, "bytes": size, "sha256": digest.hexdigest()}
