"""The parts of all-in-one checkpoints by their names, and the names that ComfyUI's detection expects of them.

stable-diffusion.cpp (src/convert.cpp, src/name_conversion.cpp) writes the names of the original checkpoint or its own:
`model.diffusion_model.`, `first_stage_model.` or `vae.`, and for text encoders `cond_stage_model.` (the only or first
one), `cond_stage_model.1.` (the second), `conditioner.embedders.N.`, `text_encoders.<name>.transformer.`, `te.`, `te1.`
to `te3.`, `clip_l.`, `clip_g.`. ComfyUI expects of UNet models the names of the original checkpoints, of all others
`text_encoders.<name>.transformer.` (comfy/supported_models.py, process_clip_state_dict).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from .text_encoder_gguf import mapped_name
from .text_encoder_tables import FAMILIES

DIFFUSION_PREFIX = "model.diffusion_model."
VAE_PREFIXES = ("first_stage_model.", "vae.")
# Averaged weights of a training run: a second model that nobody samples with.
UNUSED_PREFIXES = ("model_ema.",)

_ENCODER = re.compile(
    r"(cond_stage_model\.1|cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.[^.]+|te\d?|clip_[lgh]|t5xxl)\."
    r"(?:(?:transformer|model)\.(?=\D))?(.+)"
)
_TOKENS = "text_model.embeddings.token_embedding.weight"
_T5_BLOCK = re.compile(r"encoder\.block\.\d+\.")
# CLIP's first versions have no such level.
_WITHOUT_TEXT_MODEL = re.compile(r"(embeddings|encoder\.layers|final_layer_norm)\.")
_LLAMA_CPP_T5 = re.compile(r"(enc|dec)\.(blk\.\d+|output_norm)\.|token_embd\.")
_CLIP_WIDTHS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
_UNET = "input_blocks.0.0.weight"

# The encoders of a UNet model together: where its configuration in ComfyUI looks for each.
_UNET_PLACES: dict[frozenset[str], dict[str, str]] = {
    frozenset({"clip_l"}): {"clip_l": "cond_stage_model"},
    frozenset({"clip_h"}): {"clip_h": "cond_stage_model.model"},
    frozenset({"clip_g"}): {"clip_g": "conditioner.embedders.0.model"},
    frozenset({"clip_l", "clip_g"}): {
        "clip_l": "conditioner.embedders.0",
        "clip_g": "conditioner.embedders.1.model",
    },
}


def encoder_groups(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The text encoders of a checkpoint: what stands before their names, to (name inside, name in the file)."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        match = _ENCODER.match(name)
        inner = _inner_name(match[2]) if match else None
        if match is not None and inner is not None:
            groups.setdefault(match[1], {})[inner] = name
    return groups


def _inner_name(name: str) -> str | None:
    if _LLAMA_CPP_T5.match(name):
        return mapped_name(name, FAMILIES["t5encoder"].names)
    return f"text_model.{name}" if _WITHOUT_TEXT_MODEL.match(name) else name


def encoder_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """ComfyUI's word for the encoder with these tensors (names inside, as Hugging Face has them). None for those
    that no other program renames."""
    if any(_T5_BLOCK.match(name) for name in shapes):
        return "t5xxl"
    tokens = shapes.get(_TOKENS, ())
    return _CLIP_WIDTHS.get(tokens[1]) if len(tokens) == 2 else None


def encoder_places(kinds: Mapping[str, str | None], diffusion_names: Collection[str]) -> dict[str, str]:
    """Where ComfyUI looks for each text encoder of this model ("…" of "….transformer.<name inside>").

    kinds: what stands before an encoder's names in the file, to its kind. diffusion_names: those of the diffusion
    model, without prefix.
    """
    known = frozenset(kind for kind in kinds.values() if kind)
    unet_places = _UNET_PLACES.get(known, {})
    places = {}
    for prefix, kind in kinds.items():
        if prefix.startswith("text_encoders.") or kind is None:
            places[prefix] = prefix  # ComfyUI's own way, or nobody's
        elif _UNET in diffusion_names:
            places[prefix] = unet_places.get(kind, prefix)
        else:
            places[prefix] = f"text_encoders.{kind}"
    return places


def placed_name(place: str, inner: str) -> str:
    """Tokenizers and single numbers (logit_scale) lie beside the transformer."""
    return f"{place}.transformer.{inner}" if "." in inner else f"{place}.{inner}"
