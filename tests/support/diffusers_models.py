"""Tiny diffusion models of diffusers' own classes, narrow where ComfyUI's detection lets them be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

# Class and arguments. What ComfyUI takes for granted (text widths, head widths, PixArt's 1152 channels, SDXL's 320) is
# as in the real models, and SD3 has a block for every 64 channels.
CONFIGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_attention_heads": 2,
            "joint_attention_dim": 512,
            "guidance_embeds": True,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 128,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"num_layers": 1, "sample_size": 64, "caption_channels": 4096},
    ),
    "pixart-alpha": (
        "PixArtTransformer2DModel",
        {"num_layers": 1, "sample_size": 128, "caption_channels": 4096, "use_additional_conditions": True},
    ),
    "qwen_image": ("QwenImageTransformer2DModel", {"num_layers": 1, "num_attention_heads": 2}),
    "wan": (
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "text_dim": 4096, "ffn_dim": 512, "num_layers": 2},
    ),
    "wan-i2v": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "text_dim": 4096,
            "ffn_dim": 512,
            "num_layers": 1,
            "in_channels": 36,
            "image_dim": 1280,
            "added_kv_proj_dim": 256,
            "pos_embed_seq_len": 514,
        },
    ),
    "wan-vace": (
        "WanVACETransformer3DModel",
        {"num_attention_heads": 2, "text_dim": 4096, "ffn_dim": 512, "num_layers": 2, "vace_layers": [0]},
    ),
    "sdxl": (  # KOALA-700M's depths, which ComfyUI matches exactly, at one width
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 320, 320),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "mid_block_type": None,
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 5),
            "reverse_transformer_layers_per_block": ((1, 1), (1, 1), (1, 1)),
            "attention_head_dim": (5, 5, 5),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sd15": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 320),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
    ),
}

# For tests without ComfyUI: the same blocks, narrower.
NARROW: dict[str, Mapping[str, Any]] = {
    "flux": {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "pooled_projection_dim": 64},
    "sd3": {"joint_attention_dim": 128, "pooled_projection_dim": 64},
    "pixart": {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "cross_attention_dim": 128,
        "caption_channels": 64,
    },
    "qwen_image": {"attention_head_dim": 64, "axes_dims_rope": (8, 28, 28), "joint_attention_dim": 128},
    "wan": {"attention_head_dim": 64, "text_dim": 128, "ffn_dim": 256},
    "sdxl": {
        "block_out_channels": (64, 64, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 1, 1),
        "cross_attention_dim": 128,
        "projection_class_embeddings_input_dim": 1600,
    },
}


def tiny_diffusers_model(family: str, narrow: bool = False, **changes: Any) -> Any:
    """A model of the family with random weights, biases and norms included; the same each time."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    name, config = CONFIGS[family]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**{**config, **(NARROW[family] if narrow else {}), **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)
