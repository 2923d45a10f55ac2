"""From text-encoder files, GGUF or safetensors in any mix, to ComfyUI's CLIP."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError, safe_open

from ...quant_backends.core.errors import FileFormatError, SnugError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.formats import FORMATS
from ...quant_backends.readers import TextEncoderGGUF, open_text_encoder_gguf
from ...quant_backends.readers.text_encoder_tables import DIRECT_TENSORS
from ...quant_backends.readers.tokenizers import needed_tokenizer, tokenizer_tensor
from .compat import supported_arguments
from .core_errors import is_about_the_file, summary
from .layout import pack
from .mmproj import choose_mmproj, guard_missing_vision
from .operations import build_operations
from .packed_module import LoadSettings, set_compute_dtype
from .patcher import adopt
from .text_encoder_kinds import check_kinds, detect_kind

logger = logging.getLogger("snug")

# What ComfyUI's text encoders calculate in, on every device.
COMPUTE_DTYPE = torch.float32
HALF_FORMATS = {torch.float16: FORMATS["F16"], torch.bfloat16: FORMATS["BF16"]}
# Marks of ComfyUI's own quantized weights.
CORE_QUANTIZED = ("scaled_fp8", ".comfy_quant", ".scale_weight", ".weight_scale")
# One of these is in every text encoder, also in those that detection leaves to ComfyUI's defaults.
TEXT_NAMES = re.compile(
    r"token_embedding|embed_tokens|word_embeddings|shared\.weight|text_model|transformer\.resblocks"
    r"|text_embedding_projection"
)
MIX_HINT = "load it without GGUF files beside it, or choose a GGUF or a plain version of it"


@dataclass(frozen=True)
class _Encoder:
    """One chosen file: its header. gguf: None for safetensors."""

    path: str
    kind: str | None
    gguf: TextEncoderGGUF | None
    nbytes: int


def load_text_encoders(
    paths: Sequence[str], clip_type: str, mmproj: str = "auto", disable_dynamic: bool = False
) -> Any:
    """Load one to four text encoders as one CLIP.

    clip_type: an entry of `clip_types()`. mmproj: "auto" looks for a vision part that fits beside the files,
    "none" takes none, anything else is its path. disable_dynamic: core asks for it when the model must not
    use dynamic VRAM.
    Raises SnugError when a file is damaged, is no text encoder, or is not for this type: before anything is
    loaded.
    """
    encoders = [_open(path) for path in paths]
    check_kinds([(encoder.path, encoder.kind) for encoder in encoders], clip_type)
    known_type = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    if not any(encoder.gguf for encoder in encoders):
        return _load_with_core(paths, known_type, disable_dynamic)
    vision = choose_mmproj([encoder.gguf for encoder in encoders if encoder.gguf], mmproj)
    bar = comfy.utils.ProgressBar(2 * sum(encoder.nbytes for encoder in encoders))
    reader = _Progress(bar)
    state_dicts = [_state_dict(encoder, reader) for encoder in encoders]
    for state_dict, encoder in zip(state_dicts, encoders, strict=True):
        if vision is not None and encoder.gguf is vision.encoder:
            state_dict.update(_packed(vision.gguf.state_dict()))
    loaded = {name for state_dict in state_dicts for name in state_dict}
    clip = _build(paths, state_dicts, known_type, LoadSettings(on_weight=reader), disable_dynamic)
    guard_missing_vision(clip.cond_stage_model, loaded)
    adopt(clip.patcher)
    set_compute_dtype(clip.cond_stage_model, COMPUTE_DTYPE)
    # How newer ComfyUI builds this model again when it needs one without dynamic VRAM.
    clip.patcher.cached_patcher_init = (_load_patcher, (tuple(paths), clip_type, mmproj))
    bar.update_absolute(bar.total)
    return clip


def _load_patcher(paths: Sequence[str], clip_type: str, mmproj: str, disable_dynamic: bool = False) -> Any:
    return load_text_encoders(paths, clip_type, mmproj, disable_dynamic).patcher


@dataclass
class _Progress:
    bar: Any
    done: int = 0

    def __call__(self, nbytes: int) -> None:
        self.done = min(self.done + nbytes, self.bar.total)
        self.bar.update_absolute(self.done)


def _open(path: str) -> _Encoder:
    if path.lower().endswith(".gguf"):
        gguf = open_text_encoder_gguf(path)
        kind = detect_kind({name: info.shape for name, info in gguf.infos.items()})
        if kind is None:
            raise FileFormatError(
                path,
                "the tensors in the file match none of the text encoders that this ComfyUI knows",
                "update ComfyUI if the model is newer than it, or choose another file",
            )
        return _Encoder(path, kind, gguf, gguf.nbytes)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            path, f"the file cannot be read ({error})", "check that it is a complete .safetensors file"
        ) from error
    kind = detect_kind(shapes)
    if kind is None and not any(TEXT_NAMES.search(name) for name in shapes):
        raise FileFormatError(
            path,
            "the file is no text encoder that this ComfyUI knows",
            "choose another file; load diffusion models with 'Load Diffusion Model (Snug)'",
        )
    return _Encoder(path, kind, None, os.path.getsize(path))


def _load_with_core(paths: Sequence[str], clip_type: Any, disable_dynamic: bool) -> Any:
    options = supported_arguments(comfy.sd.load_clip, disable_dynamic=disable_dynamic)
    embeddings = folder_paths.get_folder_paths("embeddings")
    return comfy.sd.load_clip(list(paths), embedding_directory=embeddings, clip_type=clip_type, **options)


def _state_dict(encoder: _Encoder, progress: _Progress) -> dict[str, Any]:
    """Packed weights and whatever else ComfyUI expects in this encoder's state dict."""
    if encoder.gguf is None:
        state_dict = _plain_state_dict(encoder.path)
        progress(encoder.nbytes)
        return state_dict
    state_dict = _packed(encoder.gguf.state_dict(progress))
    key = needed_tokenizer(encoder.gguf)
    if key is not None:
        if key == "spiece_model" and importlib.util.find_spec("sentencepiece") is None:
            raise SnugError(
                f"{encoder.path}: this text encoder needs the Python package sentencepiece, which is not "
                f"installed; run 'pip install sentencepiece' in ComfyUI's environment and restart."
            )
        state_dict[key] = tokenizer_tensor(encoder.gguf, key)
    return state_dict


def _plain_state_dict(path: str) -> dict[str, Any]:
    """A safetensors file beside GGUF ones: matrices of 16 bits are taken as packed, so that none is copied."""
    state_dict, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    if any(name.endswith(CORE_QUANTIZED) for name in state_dict) or "_quantization_metadata" in (
        metadata or {}
    ):
        problem = "a file with ComfyUI's own quantized weights cannot be mixed with GGUF files"
        raise FileFormatError(path, problem, MIX_HINT)
    for name, tensor in state_dict.items():
        fmt = HALF_FORMATS.get(tensor.dtype)
        if fmt and tensor.dim() == 2 and name.endswith(".weight") and not DIRECT_TENSORS.match(name):
            data = tensor.contiguous().view(torch.uint8).view(-1)
            state_dict[name] = pack(PackedTensor(data, fmt, tuple(tensor.shape)), COMPUTE_DTYPE)
    return state_dict


def _packed(tensors: dict[str, PackedTensor | torch.Tensor]) -> dict[str, Any]:
    return {
        name: pack(tensor, COMPUTE_DTYPE) if isinstance(tensor, PackedTensor) else tensor
        for name, tensor in tensors.items()
    }


def _build(
    paths: Sequence[str],
    state_dicts: list[dict[str, Any]],
    clip_type: Any,
    settings: LoadSettings,
    disable_dynamic: bool,
) -> Any:
    load = comfy.sd.load_text_encoder_state_dicts
    model_options = {
        "custom_operations": build_operations(settings),
        "dtype": COMPUTE_DTYPE,  # of norms and biases, which GGUF files have in float32
        # Packed weights start where the file is mapped; ComfyUI moves them when they are used. It would guess
        # from the logical size otherwise, and build the model on the GPU before there are weights.
        "initial_device": torch.device("cpu"),
    }
    try:
        return load(
            state_dicts,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=clip_type,
            model_options=model_options,
            **supported_arguments(load, disable_dynamic=disable_dynamic),
        )
    except RuntimeError as error:
        if not is_about_the_file(error):
            raise
        names = " and ".join(Path(path).name for path in paths)
        raise SnugError(
            f"The text encoder {names} does not fit the model that ComfyUI builds for it "
            f"({summary(error)}); update ComfyUI or choose another file."
        ) from error
