"""From text-encoder files, GGUF or safetensors in any mix, to ComfyUI's CLIP."""

from __future__ import annotations

import importlib.util
import logging
import re
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...quant_backends.core.errors import FileFormatError, SnugError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.readers import (
    TextEncoderGGUF,
    TextEncoderSafetensors,
    open_text_encoder_gguf,
    open_text_encoder_safetensors,
)
from ...quant_backends.readers.gguf_file import looks_like_gguf
from ...quant_backends.readers.text_encoder_tables import DIRECT_TENSORS
from ...quant_backends.readers.tokenizers import needed_tokenizer, tokenizer_tensor
from .compat import supported_arguments
from .core_errors import refused_as, summary
from .hunyuan_dit import build_hunyuan_dit
from .layout import pack
from .mmproj import choose_mmproj, guard_missing_vision
from .operations import build_operations
from .packed_module import LoadSettings, set_compute_dtype
from .patcher import adopt
from .provenance import note_sources, with_recipe
from .quantize_on_load import AS_IN_FILE, quantize_tensors
from .text_encoder_kinds import BERT, MT5, PROJECTION, check_kinds, detect_kind

logger = logging.getLogger("snug")

# What ComfyUI's text encoders calculate in, on every device.
COMPUTE_DTYPE = torch.float32
# One of these is in every text encoder, also in those that detection leaves to ComfyUI's defaults.
TEXT_NAMES = re.compile(r"token_embedding|embed_tokens|word_embeddings|shared\.weight|text_model")
# Kinds whose quantized weights ComfyUI's loader does not look for: it would leave their scales away.
UNSCALED_BY_CORE = (
    *("CLIP_L", "CLIP_G", "CLIP_H", "T5_XL", "T5_BASE", "UMT5_BASE", "BYT5_SMALL_GLYPH"),
    *("T5_GEMMA", "JINA_CLIP_2", PROJECTION),
)


@dataclass(frozen=True)
class _Encoder:
    """One chosen file whose header has been read, and what it is."""

    file: TextEncoderGGUF | TextEncoderSafetensors
    kind: str | None

    @property
    def path(self) -> str:
        return str(self.file.path)

    @property
    def gguf(self) -> TextEncoderGGUF | None:
        return self.file if isinstance(self.file, TextEncoderGGUF) else None


def load_text_encoders(
    paths: Sequence[str],
    clip_type: str,
    mmproj: str = "auto",
    quantize: str = AS_IN_FILE,
    disable_dynamic: bool = False,
) -> Any:
    """Load one to four text encoders as one CLIP.

    clip_type: an entry of `clip_types()`. mmproj: "auto" looks for a vision part that fits beside the files,
    "none" takes none, anything else is its path. quantize: AS_IN_FILE, or the target for weights that are not
    quantized in their file, which are read and quantized one at a time. disable_dynamic: core asks for it when the
    model must not use dynamic VRAM.
    Raises SnugError when a file is damaged, is no text encoder, or is not for this type: before anything is
    loaded.
    """
    _refuse_twice(paths)
    encoders = [_open(path) for path in paths]
    check_kinds([(encoder.path, encoder.kind) for encoder in encoders], clip_type)
    known_type = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    vision = choose_mmproj([encoder.gguf for encoder in encoders if encoder.gguf], mmproj)
    if all(_is_for_core(encoder) for encoder in encoders) and (
        quantize == AS_IN_FILE or not any(_is_plain(encoder) for encoder in encoders)
    ):
        clip = _load_with_core(encoders, known_type, disable_dynamic)
        note_sources(clip.patcher, paths)
        return clip
    _refuse_core_formats(encoders)
    _check_sentencepiece(encoders)
    bar = comfy.utils.ProgressBar(2 * sum(encoder.file.nbytes for encoder in encoders))
    reader = _Progress(bar)
    recipes: list[dict[str, Any]] = []
    state_dicts = [_state_dict(encoder, reader, quantize, recipes) for encoder in encoders]
    for state_dict, encoder in zip(state_dicts, encoders, strict=True):
        if vision is not None and encoder.file is vision.encoder:
            state_dict.update(_packed(vision.gguf.state_dict()))
    loaded = {name for state_dict in state_dicts for name in state_dict}
    clip = _build(encoders, state_dicts, known_type, LoadSettings(on_weight=reader), disable_dynamic)
    guard_missing_vision(clip.cond_stage_model, loaded)
    adopt(clip.patcher)
    set_compute_dtype(clip.cond_stage_model, COMPUTE_DTYPE)
    # How newer ComfyUI builds this model again when it needs one without dynamic VRAM.
    clip.patcher.cached_patcher_init = (_load_patcher, (tuple(paths), clip_type, mmproj, quantize))
    note_sources(clip.patcher, paths)
    for recipe in recipes:
        with_recipe(clip.patcher, recipe)
    bar.update_absolute(bar.total)
    return clip


def _load_patcher(
    paths: Sequence[str], clip_type: str, mmproj: str, quantize: str, disable_dynamic: bool = False
) -> Any:
    return load_text_encoders(paths, clip_type, mmproj, quantize, disable_dynamic).patcher


@dataclass
class _Progress:
    bar: Any
    done: int = 0

    def __call__(self, nbytes: int) -> None:
        self.done = min(self.done + nbytes, self.bar.total)
        self.bar.update_absolute(self.done)


def _refuse_twice(paths: Sequence[str]) -> None:
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise SnugError(
                f"{Path(path).name} is chosen twice; set one of the two to none, or to another text encoder."
            )


def _open(path: str) -> _Encoder:
    is_gguf = looks_like_gguf(path)
    file = open_text_encoder_gguf(path) if is_gguf else open_text_encoder_safetensors(path)
    kind = detect_kind(file.shapes)
    if kind is None and is_gguf:
        raise FileFormatError(
            path,
            "the tensors in the file match none of the text encoders that this ComfyUI knows",
            "update ComfyUI if the model is newer than it, or choose another file",
        )
    if kind is None and not any(TEXT_NAMES.search(name) for name in file.shapes):
        raise FileFormatError(
            path,
            "the file is no text encoder that this ComfyUI knows",
            "choose another file; load diffusion models with Load Diffusion Model (Snug)",
        )
    return _Encoder(file, kind)


def _is_for_core(encoder: _Encoder) -> bool:
    """Whether ComfyUI's own loader takes the file: plain, or quantized by ComfyUI for a kind that it looks for."""
    file = encoder.file
    if isinstance(file, TextEncoderGGUF) or encoder.kind in (BERT, MT5):
        return False
    if file.convention.core:
        return _core_reads_layers() and encoder.kind not in UNSCALED_BY_CORE
    return not file.convention.loaders


def _is_plain(encoder: _Encoder) -> bool:
    """Whether nothing in the file is quantized."""
    file = encoder.file
    return isinstance(file, TextEncoderSafetensors) and file.convention.name == "plain"


def _core_reads_layers() -> bool:
    """Whether this ComfyUI reads descriptions of quantized layers; 0.3.75 does in few text encoders."""
    return hasattr(comfy.utils, "convert_old_quants")


def _refuse_core_formats(encoders: Sequence[_Encoder]) -> None:
    """Files that only ComfyUI decodes cannot be in one CLIP with those that only Snug decodes."""
    for encoder in encoders:
        file = encoder.file
        if isinstance(file, TextEncoderSafetensors) and file.for_core_only:
            formats = " and ".join(sorted(file.convention.core_formats))
            reason, hint = (
                "cannot be mixed with files that only Snug decodes",
                "choose a GGUF or FP8 version of it",
            )
            if not _core_reads_layers():
                reason, hint = "this ComfyUI does not know", f"update ComfyUI, or {hint}"
            elif not _is_for_core(encoder):
                reason = "ComfyUI does not decode in this kind of text encoder"
            raise FileFormatError(
                encoder.path, f"the file has weights in ComfyUI's own format {formats}, which {reason}", hint
            )


def _check_sentencepiece(encoders: Sequence[_Encoder]) -> None:
    for encoder in encoders:
        needed = encoder.gguf and needed_tokenizer(encoder.gguf) == "spiece_model"
        if needed and importlib.util.find_spec("sentencepiece") is None:
            raise SnugError(
                f"{encoder.path}: this text encoder needs the Python package sentencepiece, which is not "
                f"installed; run 'pip install sentencepiece' in ComfyUI's environment and restart."
            )


def _errors_named(encoders: Sequence[_Encoder]) -> AbstractContextManager[None]:
    """Turns what ComfyUI raises about these files into one sentence."""
    names = " and ".join(Path(encoder.path).name for encoder in encoders)

    def refusal(error: Exception) -> SnugError:
        # ComfyUI 0.3.75 builds Mistral's tokenizer with parts of transformers that newer ones have changed.
        if isinstance(error, (TypeError, ValueError, AttributeError, ImportError)) and _is_in_tokenizer(
            error
        ):
            return SnugError(
                f"This ComfyUI cannot build the tokenizer of {names} with the installed transformers "
                f"({summary(error)}); update ComfyUI."
            )
        return SnugError(
            f"The text encoder {names} does not fit the model that ComfyUI builds for it "
            f"({summary(error)}); update ComfyUI or choose another file."
        )

    return refused_as(refusal)


def _is_in_tokenizer(error: Exception) -> bool:
    functions = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
    return any("tokenizer" in name.lower() for name in functions)


def _load_with_core(encoders: Sequence[_Encoder], clip_type: Any, disable_dynamic: bool) -> Any:
    options = supported_arguments(comfy.sd.load_clip, disable_dynamic=disable_dynamic)
    embeddings = folder_paths.get_folder_paths("embeddings")
    paths = [encoder.path for encoder in encoders]
    with _errors_named(encoders):
        return comfy.sd.load_clip(paths, embedding_directory=embeddings, clip_type=clip_type, **options)


def _state_dict(
    encoder: _Encoder, progress: _Progress, quantize: str, recipes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Packed weights and whatever else ComfyUI expects in this encoder's state dict.

    quantize: as for `load_text_encoders`; what was done is added to `recipes`.
    """
    tensors = encoder.file.state_dict(progress if quantize == AS_IN_FILE else None)
    if quantize != AS_IN_FILE:
        nbytes = encoder.file.nbytes
        tensors, recipe = quantize_tensors(
            tensors, quantize, DIRECT_TENSORS, lambda part: progress(int(part * nbytes)), is_text_encoder=True
        )
        recipes.append({"file": Path(encoder.path).name, **recipe})
    state_dict = _packed(tensors)
    key = needed_tokenizer(encoder.gguf) if encoder.gguf else None
    if encoder.gguf and key is not None:
        state_dict[key] = tokenizer_tensor(encoder.gguf, key)
    return state_dict


def _packed(tensors: dict[str, PackedTensor | torch.Tensor]) -> dict[str, Any]:
    return {
        name: pack(tensor, COMPUTE_DTYPE) if isinstance(tensor, PackedTensor) else tensor
        for name, tensor in tensors.items()
    }


def _build(
    encoders: Sequence[_Encoder],
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
    with _errors_named(encoders):
        if clip_type is comfy.sd.CLIPType.HUNYUAN_DIT:
            return build_hunyuan_dit(state_dicts, model_options, disable_dynamic)
        return load(
            state_dicts,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=clip_type,
            model_options=model_options,
            **supported_arguments(load, disable_dynamic=disable_dynamic),
        )
