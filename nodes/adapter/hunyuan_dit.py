"""HunyuanDiT's pair of text encoders, BERT and mT5, from files of their own.

ComfyUI has classes for them, but its loader of text encoders gives mT5 no tokenizer: only checkpoints do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.text_encoders.hydit
import comfy.utils
import folder_paths

from ...quant_backends.core.errors import SnugError
from .compat import supported_arguments

# As the tokenizer is called in ComfyUI's saved text encoders, and in other files.
TOKENIZER = "mt5xl.spiece_model"
TOKENIZERS = (TOKENIZER, "spiece_model")


def build_hunyuan_dit(
    state_dicts: Sequence[dict[str, Any]], model_options: Mapping[str, Any], disable_dynamic: bool
) -> Any:
    """A CLIP of both, in either order. Raises SnugError when the tokenizer of mT5 is in neither file."""
    found = [tensors.pop(key) for tensors in state_dicts for key in TOKENIZERS if key in tensors]
    if not found:
        raise SnugError(
            "This mT5 comes without its tokenizer, which ComfyUI does not have; choose a GGUF of it, or load it out of "
            "a HunyuanDiT checkpoint and save it with Save Text Encoder (Snug)."
        )
    hydit = comfy.text_encoders.hydit
    target = SimpleNamespace(clip=hydit.HyditModel, tokenizer=hydit.HyditTokenizer, params={})
    clip = comfy.sd.CLIP(
        target,  # pyright: ignore[reportArgumentType]
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={TOKENIZER: found[0]},
        parameters=sum(map(comfy.utils.calculate_parameters, state_dicts)),
        model_options=dict(model_options),
        **supported_arguments(comfy.sd.CLIP.__init__, disable_dynamic=disable_dynamic),
    )
    for tensors in state_dicts:
        clip.load_sd(tensors)
    return clip
