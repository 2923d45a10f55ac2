"""A text encoder of a CLIP as it goes into a GGUF file: its architecture, its sizes, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.utils
import torch

from ...quant_backends.core.errors import SnugError
from ...quant_backends.readers.diffusion_tables import PROJECTIONS
from ...quant_backends.readers.text_encoder_tables import FAMILIES
from ...quant_backends.readers.tokenizers import tokenizer_key
from ...quant_backends.writers import text_encoder_architecture, tokenizer_metadata
from ...quant_backends.writers.gguf_file import MetadataValue
from ...quant_backends.writers.tokenizers import TOKENIZER_FILES
from .containers import Content, Renamed

# llama.cpp has no names for CLIP's text models: files of them that people have keep the original ones.
CLIP_NAMES, CLIP = "text_model.encoder.layers.", "clip"
# Nor for the projection of LTX-2, which is a part of its checkpoint.
LTX = "ltxv"
EMBEDDINGS = ("shared.weight", "model.embed_tokens.weight")
# ComfyUI has it beside every text encoder, and uses it in none.
UNUSED = "logit_scale"
# HunyuanDiT's: its BERT could not be in a file beside it.
MT5 = "mt5xl.spiece_model"
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
    names = [name for name in tensors if name not in (UNUSED, MT5, *TOKENIZER_FILES)]
    if any(name.startswith(CLIP_NAMES) for name in names):
        architecture, metadata = CLIP, {}
    elif any(name.startswith(PROJECTIONS) for name in names):
        architecture, metadata = LTX, {}
    else:
        found = text_encoder_architecture(names)
        if found is None or content.encoder is None or MT5 in tensors:
            raise SnugError(
                f"A part of the text encoders ({names[0]}, …) is of a kind that cannot be loaded from a GGUF "
                f"file; {SAFETENSORS_INSTEAD}."
            )
        architecture = found
        metadata = {**_sizes(content.encoder, architecture), **_tokenizer(content, architecture)}
    chosen = Renamed(tensors, {name: name for name in names}, {})
    return replace(content, tensors=chosen, architecture=architecture, metadata=metadata)


def _sizes(encoder: torch.nn.Module, architecture: str) -> Mapping[str, MetadataValue]:
    """What tensors do not tell: among it heads of attention, by which rows of query and key are ordered."""
    config: Any = getattr(getattr(encoder, "model", None), "config", None)
    if config is None:
        return {}
    head_size = getattr(config, "global_head_dim", None) or getattr(config, "head_dim", None)
    found = {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "context_length": getattr(config, "max_position_embeddings", None),
        "rope.freq_base": _largest(getattr(config, "rope_theta", None)),
        # False stands for the layers that see everything.
        "attention.sliding_window": _largest(getattr(config, "sliding_attention", None)),
    }
    return {f"{architecture}.{key}": value for key, value in found.items() if value}


def _largest(value: Any) -> Any:
    """Where layers differ, ComfyUI's configuration has a list, in an order that its versions differ in; what files tell
    is that of the layers that see everything (its base is the larger one) and the one window of the others.
    """
    return max(value) if isinstance(value, list) and value else value


def _tokenizer(content: Content, architecture: str) -> Mapping[str, MetadataValue]:
    """What is needed of the tokenizer to load the file: nothing where ComfyUI brings it along."""
    found = next((key for key in TOKENIZER_FILES if key in content.tensors), None)
    name = next(name for name in EMBEDDINGS if name in content.tensors)
    rows = comfy.utils.get_attr(content.encoder, name).shape[0]
    wanted = tokenizer_key(FAMILIES[architecture], rows)
    if found is None:
        if wanted in (None, "tekken_model"):  # a LLaMA of whatever vocabulary has none in its CLIP
            return {}
        raise SnugError(
            f"This text encoder ({architecture}) comes without its tokenizer, which has to be in the GGUF file; load "
            f"it from a file that has its {wanted}."
        )
    if wanted not in (None, found) or (wanted is None and found != "spiece_model"):
        raise SnugError(
            f"This text encoder ({architecture}) has a {found} as its tokenizer, which does not go into a GGUF file of "
            f"it; {SAFETENSORS_INSTEAD}."
        )
    tokenizer = content.tensors[found]
    if not isinstance(tokenizer, torch.Tensor):
        return {}
    return tokenizer_metadata(found, tokenizer.numpy().tobytes(), rows)
