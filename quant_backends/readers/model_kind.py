"""Recognise files that are no diffusion models, by name and metadata alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import FileFormatError
from .diffusion_tables import (
    COMPANIONS,
    CONNECTORS,
    CONTROLNET,
    LORA,
    PROJECTIONS,
    TEXT_ENCODER,
    VAE,
    VAE_DECODER,
    VISION_TOWER,
)

VISION_TYPES = ("mmproj", "clip-vision")


def text_value(metadata: Mapping[str, Any], key: str) -> str | None:
    """The text stored under `key`; None when the key is absent or holds something else."""
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def is_text_encoder(names: Collection[str]) -> bool:
    """Whether tensors of these names are a text encoder, or LTX-2's projection with nothing else but connectors."""
    if any(TEXT_ENCODER.match(name) for name in names):
        return True
    return any(name.startswith(PROJECTIONS) for name in names) and all(
        name.startswith(PROJECTIONS + CONNECTORS) for name in names
    )


def refuse_other_kinds(path: Path, names: Collection[str], metadata: Mapping[str, Any]) -> None:
    """Raise FileFormatError when a file is a text encoder, vision tower, LoRA, ControlNet or autoencoder.

    Names decide before `general.architecture` does, which is often missing or wrong.
    """
    kind = text_value(metadata, "general.type")
    architecture = text_value(metadata, "general.architecture")
    known_as = f" ({architecture})" if architecture and architecture.isidentifier() else ""
    if kind == "adapter" or any(LORA.match(name) for name in names):
        _refuse(path, f"a LoRA{known_as}", "put it into models/loras and load it with Load LoRA (Snug)")
    if kind in VISION_TYPES or any(VISION_TOWER.match(name) for name in names):
        _refuse(
            path,
            f"the vision part (mmproj) of a text encoder{known_as}",
            "put it into models/text_encoders beside its text encoder and load both with Load Text Encoders (Snug)",
        )
    if is_text_encoder(names):
        _refuse(
            path,
            f"a text encoder{known_as}",
            "put it into models/text_encoders and load it with Load Text Encoders (Snug)",
        )
    if any(CONTROLNET.match(name) for name in names):
        _refuse(
            path, f"a ControlNet{known_as}", "put it into models/controlnet and use Load ControlNet (Snug)"
        )
    if any(VAE_DECODER.match(name) for name in names) and all(VAE.match(name) for name in names):
        _refuse(path, f"a VAE{known_as}", "put it into models/vae and load it with a VAE loader")
    if all(COMPANIONS.match(name) for name in names):
        found = "holds no tensors" if not names else "holds text encoders or a VAE but no diffusion model"
        raise FileFormatError(path, f"the file {found}", "choose the file of the diffusion model itself")


def _refuse(path: Path, found: str, hint: str) -> None:
    raise FileFormatError(path, f"the file is {found}, expected a diffusion model", hint)
