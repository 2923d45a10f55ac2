"""Lets ComfyUI detect tiny models of families whose head count it takes for granted.

ComfyUI derives the other sizes from the tensors' shapes. Patching it is for tests alone: the pack itself
never does.
"""

from __future__ import annotations

from typing import Any

import comfy.model_detection

_HEAD_WIDTH = 128  # of Flux, Qwen-Image and Z-Image alike
_LUMINA_WIDTHS = (2304, 3840)  # Lumina 2 and Z-Image, which ComfyUI tells apart by width


def accept_narrow_models() -> None:
    """Replaces `detect_unet_config` by a version that corrects the sizes; calling it again changes nothing."""
    original = comfy.model_detection.detect_unet_config
    if getattr(original, "accepts_narrow_models", False):
        return

    def detect(state_dict: dict[str, Any], key_prefix: str, metadata: Any = None) -> dict[str, Any] | None:
        config = original(state_dict, key_prefix, metadata=metadata)
        if config is not None:
            config.update(_narrow_sizes(config, state_dict, key_prefix))
        return config

    detect.accepts_narrow_models = True  # pyright: ignore[reportFunctionMemberAccess]
    comfy.model_detection.detect_unet_config = detect


def _narrow_sizes(config: dict[str, Any], state_dict: dict[str, Any], key_prefix: str) -> dict[str, Any]:
    model = config.get("image_model")
    if model == "flux":
        return {"num_heads": config["hidden_size"] // _HEAD_WIDTH}
    if model == "qwen_image":
        return {"num_attention_heads": state_dict[f"{key_prefix}img_in.weight"].shape[0] // _HEAD_WIDTH}
    if model == "lumina2" and config["dim"] not in _LUMINA_WIDTHS:
        heads = config["dim"] // _HEAD_WIDTH
        return {
            "n_heads": heads,
            "n_kv_heads": heads,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }
    return {}
