"""A VAE that is written down instead of trained: TAEHV's layers (Wan's tiny autoencoder), which ComfyUI loads.

Only channel 0 is used between the layers. It holds the ink, from 0 to 1: the mean of the latent's channels, doubled in
size three times, each time smoothed, with its contrast raised in between; then coloured. The encoder is the way back
without the smoothing.
"""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from .data import AMPLITUDE, LATENT

# Height and width of a decoded digit.
PICTURE = 64
GROUND, INK = (0.08, 0.10, 0.16), (1.0, 0.93, 0.78)
# What is this dark becomes ground, and this bright full ink.
DARKEST, BRIGHTEST = 0.125, 0.75
_SMOOTH = torch.tensor([0.25, 0.5, 0.25])
# What TAEHV does to latents before its first layer, of the brightest one.
_BOUND = 3 * math.tanh(AMPLITUDE / 3)


def make_digits_vae(path: str | os.PathLike[str]) -> Path:
    """Writes it, bfloat16, 23 MB of which nearly all is zeros. Needs ComfyUI on `sys.path`.

    Not float16: by that ComfyUI tells HunyuanVideo's from Wan's.
    """
    taehv = importlib.import_module("comfy.taesd.taehv")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in taehv.TAEHV(LATENT[0]).state_dict().items()}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    _write_encoder(tensors)
    _write_decoder(tensors)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def decode(latents: torch.Tensor) -> torch.Tensor:
    """What the file's decoder gives for latents [N, 16, 1, 8, 8], by formula and a thousand times as fast.

    float32 [N, 64, 64, 3] from 0 to 1.
    """
    bounded = 3 * torch.tanh(latents.float() / 3)
    ink = (bounded.mean(dim=1) / (2 * _BOUND) + 0.5).clamp_min(0)
    ink = _smooth(_double(_smooth(_double(ink))))
    ink = ((ink - DARKEST) / (BRIGHTEST - DARKEST)).clamp(0, 1)
    ink = _smooth(_smooth(_double(ink))).movedim(1, -1)
    ground = torch.tensor(GROUND)
    return ground + ink * (torch.tensor(INK) - ground)


def _double(ink: torch.Tensor) -> torch.Tensor:
    """[N, 1, H, W] to twice the height and width."""
    return ink.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


def _smooth(ink: torch.Tensor) -> torch.Tensor:
    return F.conv2d(ink, torch.outer(_SMOOTH, _SMOOTH).view(1, 1, 3, 3), padding=1)


def _write_decoder(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.1.weight"][0, :, 1, 1] = 1 / (2 * _BOUND * LATENT[0])
    tensors["decoder.1.bias"][0] = 0.5
    for number in (7, 13, 19):  # TGrow: each frame that it makes is the one before
        weight = tensors[f"decoder.{number}.conv.weight"]
        weight[:: weight.shape[1], 0] = 1
    for number in (8, 14, 20):
        tensors[f"decoder.{number}.weight"][0, 0] = torch.outer(_SMOOTH, _SMOOTH)
    _raise_contrast(tensors, "decoder.17.conv")
    ground, ink = torch.tensor(GROUND), torch.tensor(INK)
    tensors["decoder.22.weight"][:, 0] = (ink - ground).view(3, 1, 1) * torch.outer(_SMOOTH, _SMOOTH)
    tensors["decoder.22.bias"][:] = ground


def _raise_contrast(tensors: dict[str, torch.Tensor], block: str) -> None:
    """Ink x becomes clamp((x - DARKEST) / (BRIGHTEST - DARKEST), 0, 1) in a residual block.

    As relu(g x - d) - relu(g x - d - 1) - x, in three channels, to which the block adds x.
    """
    gain = 1 / (BRIGHTEST - DARKEST)
    first, second, third = (f"{block}.{number}" for number in (0, 2, 4))
    tensors[f"{first}.weight"][:3, 0, 1, 1] = torch.tensor([gain, gain, 1])
    tensors[f"{first}.bias"][:3] = torch.tensor([-gain * DARKEST, -gain * DARKEST - 1, 0])
    for channel in range(3):
        tensors[f"{second}.weight"][channel, channel, 1, 1] = 1
    tensors[f"{third}.weight"][0, :3, 1, 1] = torch.tensor([1.0, -1.0, -1.0])


def _write_encoder(tensors: dict[str, torch.Tensor]) -> None:
    ground, ink = torch.tensor(GROUND), torch.tensor(INK)
    tensors["encoder.0.weight"][0, :, 1, 1] = 1 / (3 * (ink - ground))
    tensors["encoder.0.bias"][0] = -(ground / (3 * (ink - ground))).sum()
    for pool, conv in ((2, 3), (7, 8), (12, 13)):
        tensors[f"encoder.{pool}.conv.weight"][0, 0] = 1  # the first of the frames that become one
        tensors[f"encoder.{conv}.weight"][0, 0, 1:, 1:] = 0.25
    tensors["encoder.17.weight"][:, 0, 1, 1] = 2 * AMPLITUDE
    tensors["encoder.17.bias"][:] = -AMPLITUDE
