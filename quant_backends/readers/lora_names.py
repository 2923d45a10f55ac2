"""What is known about tensor names in LoRA files, as data."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# The ends of names that ComfyUI's weight adapters look for: LoRA, LoHa, LoKr, GLoRA, OFT, and whole differences.
ADAPTER_TENSOR = re.compile(
    r".*([._]lora\d?\.(up|down)\.weight|\.lora_(up|down|mid)\.weight|\.lora_[AB](\.default)?(\.weight)?"
    r"|\.lora_linear_layer\.(up|down)\.weight|\.lora_[ab]|\.hada_[wt][12](_[ab])?|\.lokr_[wt][12](_[ab])?"
    r"|\.[ab][12]\.weight|\.oft_(blocks|diag)|\.diff(_b)?|\.set_weight|\.[wb]_norm)$"
)
# The two matrices of a LoRA among them.
FACTOR = re.compile(r".*[._]lora(_linear_layer)?[._](up|down|[ABab])(\.|$)")

# Names as trainers write them, with every dot as an underscore, and what such a LoRA is for. The first that
# matches counts.
TARGETS = (
    (re.compile(r"(.*_)?double_stream_blocks_\d+_"), "HiDream"),
    (
        re.compile(r"(.*_)?(double_blocks|single_blocks|single_transformer_blocks)_\d+_"),
        "Flux or HunyuanVideo",
    ),
    (re.compile(r"(.*_)?joint_blocks_\d+_"), "Stable Diffusion 3"),
    (re.compile(r"(.*_)?(joint_transformer_blocks|single_transformer_layers)_\d+_"), "AuraFlow"),
    (re.compile(r"(.*_)?(down|up|input|output)_blocks_\d+_|(.*_)?(mid|middle)_block_"), "UNet"),
    (re.compile(r"(.*_)?transformer_blocks_\d+_(img|txt)_(mlp|mod)_"), "Qwen-Image"),
    (re.compile(r"(.*_)?transformer_blocks_\d+_attn_"), "Stable Diffusion 3 or Qwen-Image"),
    (re.compile(r"(.*_)?transformer_blocks_\d+_attn1_"), "LTX-Video or PixArt"),
    (re.compile(r"(.*_)?blocks_\d+_(self|cross)_attn_"), "Wan or Cosmos"),
    (re.compile(r"(.*_)?layers_\d+_(attention|feed_forward)_"), "Lumina 2 or Z-Image"),
)
TEXT_ENCODER = re.compile(
    r"(lora_te\d?_|text_encoder|(enc_)?blk_\d|token_embd|(.*_)?(layers_\d+_self_attn|layer_\d+_SelfAttention)_)"
)

# The UNets have the same names; the width of the text embedding tells them apart.
_CONTEXT = re.compile(r".*attn2[._]to_[kv]\..*lora([._]down|_[Aa])\b")
_UNETS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}


def is_lora(names: Collection[str]) -> bool:
    """Whether a file with these tensors is a LoRA or one of its relatives."""
    return any(ADAPTER_TENSOR.match(name) for name in names)


def lora_target(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What the LoRA with these tensors was trained for, in the words of the user; None when nobody can tell.

    shapes: tensor name, as in the file, to shape in torch order.
    """
    adapters = [name for name in shapes if ADAPTER_TENSOR.match(name)]
    names = [name.replace(".", "_") for name in adapters]
    for pattern, target in TARGETS:
        if any(pattern.match(name) for name in names):
            if target != "UNet":
                return target
            widths = {shapes[name][1] for name in adapters if _CONTEXT.match(name) and len(shapes[name]) > 1}
            return next(
                (_UNETS[width] for width in widths if width in _UNETS), "Stable Diffusion 1, 2 or SDXL"
            )
    return "a text encoder" if any(TEXT_ENCODER.match(name) for name in names) else None
