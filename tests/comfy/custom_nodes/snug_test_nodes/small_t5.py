"""Lets ComfyUI load T5 text encoders of any size, whose configuration it takes for granted.

Patching it is for tests alone: the pack itself never does.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import comfy.sd

_T5_ROWS, _T5_WIDTH = 32128, 4096
_UP = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_IN_CHECKPOINT = "text_encoders.t5xxl.transformer."
_BLOCK = re.compile(r"encoder\.block\.(\d+)\.")


def accept_small_t5() -> None:
    """Replaces ComfyUI's detection and loading of text encoders; calling it again changes nothing."""
    detect, load = comfy.sd.detect_te_model, comfy.sd.load_text_encoder_state_dicts
    load_checkpoint = comfy.sd.load_state_dict_guess_config
    if getattr(detect, "accepts_small_t5", False):
        return

    def detect_small(state_dict: dict[str, Any]) -> Any:
        return comfy.sd.TEModel.T5_XXL if _is_small(state_dict) else detect(state_dict)

    def load_small(state_dicts: Any, *args: Any, **options: Any) -> Any:
        for state_dict in filter(_is_small, state_dicts):
            sizes = {"t5xxl_model_config": _sizes(state_dict)}
            options["model_options"] = {**options.get("model_options", {}), **sizes}
        return load(state_dicts, *args, **options)

    @functools.wraps(load_checkpoint)  # Snug looks at its signature
    def load_small_checkpoint(state_dict: dict[str, Any], *args: Any, **options: Any) -> Any:
        encoder = {
            name.removeprefix(_IN_CHECKPOINT): value
            for name, value in state_dict.items()
            if name.startswith(_IN_CHECKPOINT)
        }
        if _is_small(encoder):
            sizes = {"t5xxl_model_config": _sizes(encoder)}
            options["te_model_options"] = {**options.get("te_model_options", {}), **sizes}
        return load_checkpoint(state_dict, *args, **options)

    detect_small.accepts_small_t5 = True  # pyright: ignore[reportFunctionMemberAccess]
    comfy.sd.detect_te_model = detect_small
    comfy.sd.load_text_encoder_state_dicts = load_small
    comfy.sd.load_state_dict_guess_config = load_small_checkpoint


def _is_small(state_dict: dict[str, Any]) -> bool:
    table = state_dict.get("shared.weight")
    if table is None or _UP not in state_dict:
        return False
    rows, width = table.shape
    return (rows == _T5_ROWS and width < _T5_WIDTH) or rows < _T5_ROWS


def _sizes(state_dict: dict[str, Any]) -> dict[str, int]:
    heads = state_dict[_BIAS].shape[1]
    return {
        "vocab_size": state_dict["shared.weight"].shape[0],
        "d_model": state_dict["shared.weight"].shape[1],
        "d_ff": state_dict[_UP].shape[0],
        "d_kv": state_dict[_QUERY].shape[0] // heads,
        "num_heads": heads,
        "num_layers": 1 + max(int(match[1]) for match in map(_BLOCK.match, state_dict) if match),
    }
