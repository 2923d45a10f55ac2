"""The vision part of a text encoder (mmproj): choosing the file, and what happens without one."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...quant_backends.core.errors import FileFormatError, SnugError
from ...quant_backends.readers import TextEncoderGGUF, VisionGGUF, open_vision_gguf
from ...quant_backends.readers.text_encoder_tables import VISION_OF

logger = logging.getLogger("snug")

EMBEDDINGS = "model.embed_tokens.weight"
# What ComfyUI's classes call their towers for images (Qwen; Gemma, with what comes behind it) and sound (Gemma 4).
TOWERS = ("visual", "vision_model", "multi_modal_projector", "audio_model")


@dataclass(frozen=True)
class Vision:
    """A vision part and the text encoder it belongs to."""

    gguf: VisionGGUF
    encoder: TextEncoderGGUF


def choose_mmproj(encoders: Sequence[TextEncoderGGUF], choice: str) -> Vision | None:
    """choice: "auto", "none" or a path. None when no encoder can see, or none of the files beside it fits.

    A part fits when it is of the encoder's kind and makes embeddings of its width; of several the one whose
    name begins most like the encoder's is taken. Raises SnugError when a chosen file does not fit.
    """
    seeing = [encoder for encoder in encoders if encoder.architecture in VISION_OF]
    if choice == "none":
        return None
    if choice != "auto":
        gguf = open_vision_gguf(choice)
        if not encoders:
            raise FileFormatError(
                choice,
                "a vision part (mmproj) belongs to a GGUF text encoder, and none is chosen",
                "set mmproj to auto or none (.safetensors text encoders bring their own)",
            )
        for encoder in seeing:
            if _fits(gguf, encoder):
                return Vision(gguf, encoder)
        names = " and ".join(encoder.path.name for encoder in encoders)
        raise FileFormatError(
            choice,
            f"this vision part ({gguf.projector}, width {gguf.width}) does not belong to {names}",
            "choose the mmproj that was published with the text encoder, auto, or none",
        )
    for encoder in seeing:
        found = [gguf for gguf in _parts_beside(encoder.path) if _fits(gguf, encoder)]
        if found:
            best = max(found, key=lambda gguf: _alike(gguf.file.path, encoder.path))
            logger.info("%s: vision part %s", encoder.path.name, best.file.path.name)
            return Vision(best, encoder)
    return None


class MissingVision(torch.nn.Module):
    """Stands where a text encoder's vision tower would be, and says what is missing when an image comes."""

    def forward(self, *_args: object, **_options: object) -> torch.Tensor:
        raise SnugError(
            "This text encoder was loaded without its vision part, so it cannot take images or sound; put its mmproj "
            "file beside it in models/text_encoders and choose it as mmproj, or choose a .safetensors version."
        )


def guard_missing_vision(model: torch.nn.Module, loaded: Collection[str]) -> None:
    """Replaces vision towers that got no weights by MissingVision: random ones would ruin images silently.

    loaded: names of the tensors that were loaded.
    """
    for name, _ in list(model.named_modules()):
        parent, _, tower = name.rpartition(".")
        if tower in TOWERS and not any(key.startswith((f"{tower}.", f"model.{tower}.")) for key in loaded):
            setattr(model.get_submodule(parent), tower, MissingVision())


def _parts_beside(path: Path) -> list[VisionGGUF]:
    parts = []
    for name in sorted(os.listdir(path.parent)):
        if name.lower().endswith(".gguf") and name != path.name:
            try:
                parts.append(open_vision_gguf(path.parent / name))
            except FileFormatError:
                continue  # another kind of file, or one that is still being downloaded
    return parts


def _fits(gguf: VisionGGUF, encoder: TextEncoderGGUF) -> bool:
    embeddings = encoder.infos.get(EMBEDDINGS)
    return (
        VISION_OF[encoder.architecture or ""] == gguf.projector
        and embeddings is not None
        and embeddings.shape[-1] == gguf.width
    )


def _alike(part: Path, encoder: Path) -> int:
    """Length of the common beginning, without the "mmproj-" that many names start with."""
    name = part.name.lower().removeprefix("mmproj").lstrip("-_")
    return len(os.path.commonprefix([name, encoder.name.lower()]))
