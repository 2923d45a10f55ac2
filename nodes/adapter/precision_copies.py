"""Compute dtype of text encoders and VAEs. ComfyUI sets it when it builds them, so a copy gets another one."""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from typing import Any

import comfy.model_management
import comfy.sd1_clip
import torch

from .loading import COMPUTE_DTYPES
from .reweight import reweight, reweight_clip


def set_clip_precision(clip: Any, compute_dtype: str) -> Any:
    """A CLIP that shares the given one's weights and calculates in `compute_dtype`, a key of COMPUTE_DTYPES.

    ComfyUI hands embeddings to every text encoder in float32 and takes its result as float32; layers follow their
    input. auto: as it is.
    """
    dtype = COMPUTE_DTYPES[compute_dtype]
    if dtype is None:
        return clip.clone()
    new = reweight_clip(clip, _keep)
    for module in new.cond_stage_model.modules():
        if isinstance(module, comfy.sd1_clip.SDClipModel):
            module.transformer.__class__ = _encoder_in(type(module.transformer), dtype)
    return new


@lru_cache
def _encoder_in(kind: type, dtype: torch.dtype) -> type:
    """The class of a text encoder, with the forward that ComfyUI calls in `dtype`. A class, as copies keep theirs."""
    original = getattr(kind, "snug_original", kind)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("embeds"), torch.Tensor):
            kwargs["embeds"] = kwargs["embeds"].to(dtype)
        if "dtype" in kwargs:
            kwargs["dtype"] = dtype
        return original.forward(self, *args, **kwargs)

    return type(original.__name__, (original,), {"forward": forward, "snug_original": original})


def set_vae_precision(vae: Any, compute_dtype: str) -> Any:
    """A VAE with weights of its own in `compute_dtype`, a key of COMPUTE_DTYPES; auto: the given one's."""
    new = copy(vae)
    dtype = COMPUTE_DTYPES[compute_dtype]
    if dtype is not None and dtype != vae.vae_dtype:
        new.patcher = reweight(vae.patcher, _keep)
        new.first_stage_model = new.patcher.model.to(dtype)
        if hasattr(comfy.model_management, "archive_model_dtypes"):  # for dynamic VRAM, which loads to these
            comfy.model_management.archive_model_dtypes(new.first_stage_model)
        new.vae_dtype = dtype
    return new


def _keep(_name: str, _layer: torch.nn.Module) -> None:
    """Every layer keeps its weight."""
