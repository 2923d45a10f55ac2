"""Recognise files that are no text encoders, by name and metadata alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from ..core.errors import FileFormatError
from .diffusion_tables import CONNECTORS, PROJECTIONS, VAE, VAE_DECODER, VISION_TOWER
from .gguf_values import Metadata
from .model_kind import VISION_TYPES, text_value
from .text_encoder_tables import (
    ADAPTER,
    CHECKPOINT,
    DENOISER,
    THIRD_CONNECTOR_BLOCK,
)


def projection_names(names: Collection[str]) -> list[str]:
    """What ComfyUI's text encoder uses of an LTX-2 file that holds its projection: alone, with connectors, or in the
    whole checkpoint. Empty for all other files, and for text encoders that have a projection in the same file."""
    if not any(name.startswith(PROJECTIONS) for name in names) or any(
        name.startswith(("model.layers.", "blk.")) for name in names
    ):
        return []
    unused = any(name.startswith(THIRD_CONNECTOR_BLOCK) for name in names)
    wanted = PROJECTIONS if unused else PROJECTIONS + CONNECTORS
    return [name for name in names if name.startswith(wanted)]


def refuse_other_kinds(path: Path, names: Collection[str], metadata: Metadata | None = None) -> None:
    """Raise FileFormatError for a LoRA, a vision part, a VAE, a diffusion model or a whole checkpoint.

    metadata: a GGUF file's, which may name what the file is.
    """
    kind = text_value(metadata, "general.type") if metadata else None
    architecture = text_value(metadata, "general.architecture") if metadata else None
    known_as = f" ({architecture})" if architecture and architecture.isidentifier() else ""

    def refuse(found: str, hint: str) -> NoReturn:
        raise FileFormatError(path, f"the file is {found}{known_as}, expected a text encoder", hint)

    if kind == "adapter" or any(ADAPTER.match(name) for name in names):
        refuse("a LoRA", "put it into models/loras and load it with a LoRA loader")
    if kind in VISION_TYPES or any(VISION_TOWER.match(name) for name in names):
        refuse(
            "the vision part (mmproj) of a text encoder",
            "choose the text encoder here and this file as mmproj",
        )
    if any(name.startswith(PROJECTIONS) for name in names):
        return  # what LTX-2 keeps apart has names of its diffusion model
    if any(CHECKPOINT.match(name) for name in names):
        refuse(
            "a diffusion model or a whole checkpoint",
            "choose a file that holds only the text encoder, or load it with Load Diffusion Model (Snug) or a "
            "checkpoint loader",
        )
    if any(DENOISER.match(name) for name in names):
        refuse("a diffusion model", "load it with Load Diffusion Model (Snug)")
    if any(VAE_DECODER.match(name) for name in names) and all(VAE.match(name) for name in names):
        refuse("a VAE", "put it into models/vae and load it with a VAE loader")
