"""ControlNets with random weights for the tiny models."""

from __future__ import annotations

import importlib

import pytest
import torch
from tiny import FAMILIES
from tiny.weights import random_parameter

Tensors = dict[str, torch.Tensor]


def classic_controlnet() -> Tensors:
    """For the tiny SD1.5, in the names of its authors. Needs ComfyUI on `sys.path`."""
    cldm, ops = importlib.import_module("comfy.cldm.cldm"), importlib.import_module("comfy.ops")
    unused = ("out_channels", "transformer_depth_output")
    config = {key: value for key, value in FAMILIES["sd15"].config.items() if key not in unused}
    return _random(cldm.ControlNet(**config, hint_channels=3, operations=ops.disable_weight_init))


def sd3_controlnet() -> Tensors:
    """For the tiny SD3, as diffusers saves it: query, key and value apart."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.SD3ControlNetModel(
        sample_size=32,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=4096,
        caption_projection_dim=256,
        pooled_projection_dim=2048,
        pos_embed_max_size=32,
    )
    positions = {"pos_embed.pos_embed": network.state_dict()["pos_embed.pos_embed"].clone()}
    return {**_random(network), **positions}


def flux_controlnet() -> Tensors:
    """For the tiny Flux, as diffusers saves it: single blocks join query, key, value and the first half of the MLP."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.FluxControlNetModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=512,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )
    return _random(network)


def _random(network: torch.nn.Module) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {
        name: random_parameter(name, value.shape, generator) for name, value in network.state_dict().items()
    }
