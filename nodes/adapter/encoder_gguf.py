"""A text encoder of a CLIP as it goes into a GGUF file: its architecture, its tokenizer, the order of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.utils
import torch

from ...quant_backends.core.errors import SnugError
from ...quant_backends.readers.text_encoder_tables import FAMILIES, T5_BUILT_IN_ROWS
from ...quant_backends.writers import sentencepiece_metadata, text_encoder_architecture
from ...quant_backends.writers.gguf_file import MetadataValue
from .containers import Content, Renamed

# llama.cpp has no names for CLIP's text models: files of them that people have keep the original ones.
CLIP_NAMES, CLIP = "text_model.encoder.layers.", "clip"
# What the CLIP's tokenizer keeps in tensors, by ComfyUI's names.
SENTENCEPIECE, OTHERS = "spiece_model", ("tekken_model", "tokenizer_json", "mt5xl.spiece_model")
EMBEDDINGS = ("shared.weight", "model.embed_tokens.weight")
# ComfyUI has it beside every text encoder, and uses it in none.
UNUSED = "logit_scale"
SAFETENSORS_INSTEAD = (
    "quantize it to a format that safetensors files hold, such as FP8, INT8 or bitsandbytes NF4, with Quantize Text "
    "Encoder (Snug), and set format to 'auto'"
)


def as_gguf(content: Content) -> Content:
    """The same with architecture, metadata and tensors of a GGUF file, the tokenizer in the metadata.

    Names are still the original ones: the writer gives those that llama.cpp has others for. Raises SnugError for text
    encoders that Snug could not read again from such a file.
    """
    tensors = content.tensors
    names = [name for name in tensors if name not in (UNUSED, SENTENCEPIECE, *OTHERS)]
    if any(name.startswith(CLIP_NAMES) for name in names):
        architecture, metadata = CLIP, {}
    else:
        found = text_encoder_architecture(names)
        if found is None or content.encoder is None:
            raise SnugError(
                f"A part of the text encoders ({names[0]}, …) has no names in GGUF files; {SAFETENSORS_INSTEAD}."
            )
        architecture = found
        metadata = {**_heads(content.encoder, architecture), **_tokenizer(content, architecture)}
    chosen = Renamed(tensors, {name: name for name in names}, {})
    return replace(content, tensors=chosen, architecture=architecture, metadata=metadata)


def _heads(encoder: torch.nn.Module, architecture: str) -> Mapping[str, MetadataValue]:
    """Heads of attention, by which the rows of query and key are ordered in some architectures."""
    config: Any = getattr(getattr(encoder, "model", None), "config", None)
    if config is None:
        return {}
    key = f"{architecture}.attention.head_count"
    return {key: int(config.num_attention_heads), f"{key}_kv": int(config.num_key_value_heads)}


def _tokenizer(content: Content, architecture: str) -> Mapping[str, MetadataValue]:
    """What is needed of the tokenizer to load the file: nothing where ComfyUI brings it along."""
    family, encoder = FAMILIES[architecture], content.encoder
    name = next(name for name in EMBEDDINGS if name in content.tensors)
    rows = comfy.utils.get_attr(encoder, name).shape[0]
    is_needed = family.norm_shift or (name == EMBEDDINGS[0] and (rows,) not in T5_BUILT_IN_ROWS)
    model = content.tensors.get(SENTENCEPIECE)
    if (
        any(other in content.tensors for other in OTHERS)
        or (is_needed and not isinstance(model, torch.Tensor))
        or family is FAMILIES["gemma4"]
    ):
        raise SnugError(
            f"This text encoder ({architecture}) has a tokenizer that Snug does not write into GGUF files; "
            f"{SAFETENSORS_INSTEAD}."
        )
    if not isinstance(model, torch.Tensor):
        return {}
    return sentencepiece_metadata(model.numpy().tobytes(), rows)
