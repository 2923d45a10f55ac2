"""Recognise ControlNets by their names, and what of them has to be decoded, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import FileFormatError
from ..core.packed import PackedTensor
from ..kernels.dequantize import dequantize_packed
from .diffusion_tables import CONTROLNET, TEXT_ENCODER, VAE, VAE_DECODER
from .lora_names import is_lora
from .model_kind import text_value
from .text_encoder_tables import CHECKPOINT, DENOISER

# Beside the usual ControlNets: HunyuanDiT's, Qwen-Image's by Alibaba PAI.
_MORE_CONTROLNETS = re.compile(r"(after_proj_list|control_blocks)\.")
# Small networks that ComfyUI builds without exchangeable operations: T2I adapters, Stable Cascade's.
_ADAPTERS = re.compile(r"(adapter\.)?body\.\d+\.|backbone\.\d+\.")
CONTROL_LORA = "lora_controlnet"
DIFFERENCE = "difference"
# The one matrix of union ControlNets that is not called weight.
_PACKABLE = re.compile(r".*(\.weight|\.in_proj_weight)$")


def refuse_other_kinds(path: Path, names: Collection[str], metadata: Mapping[str, Any]) -> None:
    """Raise FileFormatError when the file with these tensors is no ControlNet."""
    if is_controlnet(names):
        return

    def refuse(found: str, hint: str) -> None:
        raise FileFormatError(path, f"the file is {found}, expected a ControlNet", hint)

    if text_value(metadata, "general.type") == "adapter" or is_lora(names):
        refuse("a LoRA", "put it into models/loras and load it with Load LoRA (Snug)")
    if any(CHECKPOINT.match(name) for name in names):
        refuse("a whole checkpoint", "put it into models/checkpoints and load it with Load Checkpoint (Snug)")
    if any(TEXT_ENCODER.match(name) for name in names):
        refuse("a text encoder", "load it with Load Text Encoders (Snug)")
    if any(DENOISER.match(name) for name in names):
        refuse("a diffusion model", "load it with Load Diffusion Model (Snug)")
    if any(VAE_DECODER.match(name) for name in names) and all(VAE.match(name) for name in names):
        refuse("a VAE", "put it into models/vae and load it with a VAE loader")
    raise FileFormatError(
        path, "the file is no ControlNet that Snug knows", "choose a file from models/controlnet"
    )


def is_controlnet(names: Collection[str]) -> bool:
    patterns = (CONTROLNET, _MORE_CONTROLNETS, _ADAPTERS)
    return CONTROL_LORA in names or any(pattern.match(name) for name in names for pattern in patterns)


def is_calculated_with(names: Collection[str]) -> bool:
    """Whether ComfyUI itself calculates with the weights: control LoRAs, differences to a model, T2I adapters."""
    if CONTROL_LORA in names or DIFFERENCE in names:
        return True
    return not any(CONTROLNET.match(name) or _MORE_CONTROLNETS.match(name) for name in names)


def with_dense(
    tensors: Mapping[str, PackedTensor | torch.Tensor],
) -> dict[str, PackedTensor | torch.Tensor]:
    """Decoded is what no operation takes packed, or everything where ComfyUI calculates with the weights."""
    everything = is_calculated_with(tensors.keys())
    return {
        name: dequantize_packed(value)
        if isinstance(value, PackedTensor)
        and (everything or not _PACKABLE.match(name) or len(value.shape) < 2)
        else value
        for name, value in tensors.items()
    }
