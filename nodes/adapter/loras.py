"""LoRA files of every kind onto ComfyUI's MODEL and CLIP."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy.weight_adapter.lora import LoRAAdapter

from ...quant_backends.core.errors import FileFormatError, SnugError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.readers.conventions import open_quantized_safetensors
from ...quant_backends.readers.gguf_file import looks_like_gguf
from ...quant_backends.readers.gguf_values import REDOWNLOAD, shown
from ...quant_backends.readers.lora_gguf import LoraGGUF, open_lora_gguf
from ...quant_backends.readers.lora_names import ADAPTER_TENSOR, FACTOR, is_lora, lora_target
from .compat import supported_arguments
from .core_errors import refused_as, summary
from .folders import state_on_disk

logger = logging.getLogger("snug")

CHECKPOINT_PREFIXES = ("model.diffusion_model.", "first_stage_model.", "vae.")


@dataclass(frozen=True)
class _Lora:
    """A LoRA file. gguf: layers that still need the names of a model or text encoder; None for safetensors."""

    state_dict: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    gguf: LoraGGUF | None
    shapes: Mapping[str, tuple[int, ...]]


def apply_lora(
    model: Any, clip: Any, path: str, strength_model: float, strength_clip: float
) -> tuple[Any, Any]:
    """Clones of a ModelPatcher and a CLIP (either may be None) with the LoRA of a file added, as core's loader.

    The file stays open for the next call. Raises SnugError when the file is damaged, no LoRA, or changes nothing
    here.
    """
    if model is None and clip is None:
        raise SnugError("Load LoRA (Snug) has nothing to change: connect a model, a clip, or both.")
    if strength_model == 0 and strength_clip == 0:
        return model, clip
    lora = _open(path, state_on_disk(path))
    state_dict = {**lora.state_dict, **(_named(lora.gguf, model, clip) if lora.gguf else {})}
    load = comfy.sd.load_lora_for_models
    options = supported_arguments(load, lora_metadata=dict(lora.metadata) or None)
    with refused_as(
        lambda error: FileFormatError(path, f"ComfyUI cannot use this LoRA ({summary(error)})", REDOWNLOAD)
    ):
        new_model, new_clip = load(model, clip, state_dict, strength_model, strength_clip, **options)
    counts = {
        "model": _changed(model, new_model),
        "text encoder": _changed(clip and clip.patcher, new_clip and new_clip.patcher),
    }
    _check(path, lora, counts, model, clip)
    return new_model, new_clip


@lru_cache(maxsize=1)
def _open(path: str, _state: tuple[Any, ...]) -> _Lora:
    """The newest file is kept, as core's loader keeps it; most of it is only mapped."""
    if looks_like_gguf(path):
        gguf = open_lora_gguf(path)
        shapes = {name: info.shape for name, info in gguf.file.tensors.items()}
        _check_factors(path, shapes)
        return _Lora(gguf.named_tensors(), {}, gguf, shapes)
    loaded = open_quantized_safetensors(path)
    if not is_lora(loaded.state_dict):
        raise _no_lora(path, loaded.state_dict)
    tensors = {
        name: dequantize_packed(tensor) if isinstance(tensor, PackedTensor) else tensor
        for name, tensor in loaded.state_dict.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_factors(path, shapes)
    return _Lora(tensors, loaded.metadata, None, shapes)


def _check_factors(path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ComfyUI would multiply them, and divide by their rank, in the middle of sampling only."""
    for name, shape in shapes.items():
        if ADAPTER_TENSOR.match(name) and (0 in shape or (FACTOR.match(name) and len(shape) < 2)):
            raise FileFormatError(
                path, f"the tensor {shown(name)} of the LoRA has the impossible shape {shape}", REDOWNLOAD
            )


def _no_lora(path: str, names: Mapping[str, Any]) -> FileFormatError:
    if any(name.startswith(CHECKPOINT_PREFIXES) for name in names):
        hint = "put it into models/checkpoints and load it with Load Checkpoint (Snug)"
        return FileFormatError(path, "the file is a whole checkpoint, expected a LoRA", hint)
    return FileFormatError(
        path,
        "the file holds no LoRA",
        "choose another file; models and text encoders have loaders of their own",
    )


# ---- names of layers in GGUF files ----------------------------------------------------------------------------


def _named(gguf: LoraGGUF, model: Any, clip: Any) -> dict[str, torch.Tensor]:
    """The layers of a GGUF LoRA under names that ComfyUI's key maps have for this model and text encoder."""
    weights = set() if model is None else set(model.model.state_dict())
    encoders = {} if clip is None else _encoder_layers(clip)
    tensors: dict[str, torch.Tensor] = {}
    for layer in gguf.pairs:
        heads = 0
        if clip is not None and layer in encoders:
            name = f"text_encoders.{encoders[layer]}"
            heads = _heads(clip.cond_stage_model, encoders[layer]) if gguf.is_permuted(layer) else 0
        elif f"diffusion_model.{layer}.weight" in weights:
            name = f"diffusion_model.{layer}"
        else:
            name = layer  # one of the other names that ComfyUI knows, or none of them
        if gguf.is_permuted(layer) and not heads:
            continue  # made for a text encoder that is not connected
        down, up = gguf.factors(layer, heads)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
        if gguf.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(gguf.alpha)
    return tensors


def _encoder_layers(clip: Any) -> dict[str, str]:
    """Layer name inside a text encoder to the name in CLIP, which may hold several encoders."""
    names = (
        name.removesuffix(".weight")
        for name in clip.cond_stage_model.state_dict()
        if name.endswith(".weight")
    )
    return {inner: name for name in names if (inner := name.partition(".transformer.")[2])}


def _heads(encoders: torch.nn.Module, layer: str) -> int:
    """Number of attention heads that the rows of a query or key projection belong to; 0 when it is not said."""
    attention, _, projection = layer.rpartition(".")
    module = comfy.utils.get_attr(encoders, attention)
    return getattr(module, "num_heads" if projection == "q_proj" else "num_kv_heads", 0)


# ---- what the LoRA has changed --------------------------------------------------------------------------------


@dataclass
class _Count:
    fitting: int = 0
    misshapen: int = 0


def _changed(before: Any, after: Any) -> _Count:
    """Weights that have got a patch, and those whose patch core will leave out as its size is another."""
    count = _Count()
    if after is None:
        return count
    weights = after.model.state_dict()
    for key, patches in after.patches.items():
        for patch in patches[len(before.patches.get(key, ())) :]:
            if _fits(patch, weights[key].shape):
                count.fitting += 1
            else:
                count.misshapen += 1
    return count


def _fits(patch: Any, shape: torch.Size) -> bool:
    _, value, _, part, _ = patch
    if not isinstance(value, LoRAAdapter):
        return True  # the other kinds are rare; core says what does not fit
    up, down, _, middle, _, reshaped, *_ = value.weights
    if middle is not None or reshaped is not None:
        return True
    elements = math.prod(shape)
    if part is not None:  # a slice of the weight: dimension, start, length
        elements = elements // shape[part[0]] * part[2]
    return up.flatten(1).shape[0] * down.flatten(1).shape[1] == elements


def _check(path: str, lora: _Lora, counts: Mapping[str, _Count], model: Any, clip: Any) -> None:
    """Logs what has been changed; FileFormatError when it is nothing."""
    name = os.path.basename(path)
    if any(count.fitting for count in counts.values()):
        parts = " and ".join(f"{c.fitting} weights of the {what}" for what, c in counts.items() if c.fitting)
        logger.info("%s changes %s", name, parts)
        lost = sum(count.misshapen for count in counts.values())
        if lost:
            logger.warning(
                "%s: %d of its layers have another size than the model's and are left out.", name, lost
            )
        return
    target = lora_target(lora.shapes)
    if target == "a text encoder" and clip is None:
        raise FileFormatError(path, "this LoRA changes only the text encoder", "connect clip as well")
    here = "this model" if model is None else f"this model ({type(model.model).__name__})"
    here = here if model is not None else "this text encoder"
    made_for = f"; it was made for {target}" if target else ""
    raise FileFormatError(
        path,
        f"this LoRA fits none of the layers of {here}{made_for}",
        "choose a LoRA for this model, or the model that the LoRA was made for",
    )
