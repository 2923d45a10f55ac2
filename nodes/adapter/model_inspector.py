"""What is in a MODEL, a CLIP or a file, and whether it fits on this device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management as management

from ...quant_backends.core.errors import FileFormatError, SnugError
from ...quant_backends.inspection.blocks import OTHERS, group_blocks
from ...quant_backends.inspection.fit import Demand, Device, Fit, estimate_fit
from ...quant_backends.inspection.header import architecture_of, read_header
from ...quant_backends.inspection.report import report
from ...quant_backends.inspection.stored import SINGLE_FILE, FileContents, StoredWeight
from ...quant_backends.inspection.summary import Summary, summarize, to_json
from ...quant_backends.kernels import native
from ...quant_backends.memory.plan import Block, size_text
from ...quant_backends.readers.safetensors_file import SafetensorsFile
from ...quant_backends.writers.architecture import detect_architecture
from .computing import ImageSize, computing_bytes, latent_shape, sampling_estimate
from .core_formats import is_for_core
from .folders import (
    CHECKPOINTS,
    CONTROLNETS,
    LORAS,
    TEXT_ENCODERS,
    VAES,
    diffusion_model_files,
    find_diffusion_model,
)
from .inspection_reference import Reference, build_reference, loaded_bytes
from .inspection_weights import weights_of
from .memory_budget_patcher import is_on_gpu
from .offload_units import BLOCK, offload_units

NONE = "none"
# Folder to what lists its files, and what finds one of them.
_FILES: dict[str, tuple[Callable[[], Sequence[str]], Callable[[str], str]]] = {
    "diffusion_models": (diffusion_model_files, find_diffusion_model),
    "text_encoders": (TEXT_ENCODERS.files, TEXT_ENCODERS.find),
    "checkpoints": (CHECKPOINTS.files, CHECKPOINTS.find),
    "loras": (LORAS.files, LORAS.find),
    "controlnet": (CONTROLNETS.files, CONTROLNETS.find),
    "vae": (VAES.files, VAES.find),
}
_LOADED = "its tensors are in the model that ComfyUI has built; choose the file to compare them"


class NotListedError(SnugError):
    """A file that ComfyUI does not list."""


def listed_files() -> list[tuple[str, str]]:
    """(folder, name) of every file that can be inspected."""
    return [(folder, name) for folder, (names, _) in _FILES.items() for name in names()]


def inspectable_files() -> list[str]:
    """NONE, and "folder/name" of every file that can be inspected."""
    return [NONE, *(f"{folder}/{name}" for folder, name in listed_files())]


def find_file(choice: str) -> str:
    """Full path of a listed file. Raises SnugError when it is gone."""
    folder, _, name = choice.partition("/")
    if folder not in _FILES:
        raise SnugError(f"'{choice}' is not in the list of files; press R in ComfyUI and choose another one.")
    return _FILES[folder][1](name)


def find_listed(folder: str, name: str) -> str:
    """Full path of a file that is in ComfyUI's lists now. Raises NotListedError for anything else."""
    if folder not in _FILES or name not in _FILES[folder][0]():
        raise NotListedError(
            f"'{folder}/{name}' is not in ComfyUI's lists of files that can be inspected; folders are "
            f"{', '.join(_FILES)}, and files end in .gguf or .safetensors."
        )
    return _FILES[folder][1](name)


def inspect(model: Any, clip: Any, choice: str, size: ImageSize) -> tuple[list[Summary], str, str]:
    """(summaries of what is connected or chosen, all as text, all as JSON).

    model, clip: MODEL and CLIP or None; choice: of `inspectable_files`. Raises SnugError when there is nothing to
    inspect, FileFormatError when the file is damaged.
    """
    summaries = []
    if model is not None:
        summaries.append(inspect_model(model, size))
    if clip is not None:
        summaries.append(inspect_clip(clip))
    if choice != NONE:
        summaries.append(inspect_file(find_file(choice), size))
    if not summaries:
        raise SnugError("There is nothing to inspect: connect a model or a clip, or choose a file.")
    return summaries, "\n\n\n".join(map(report, summaries)), to_json(summaries)


def inspect_model(patcher: Any, size: ImageSize) -> Summary:
    """What a MODEL holds in memory."""
    model = patcher.model
    weights = list(weights_of(model.diffusion_model))
    shape = latent_shape(patcher.get_model_object("latent_format"), size)
    computing = None if shape is None else computing_bytes(sampling_estimate(model, shape))
    return summarize(
        f"MODEL: {type(model).__name__}",
        weights,
        detect_architecture({weight.name for weight in weights}),
        facts={"computes in": _dtype_text(model.manual_cast_dtype or model.get_dtype()), **_patches(patcher)},
        metadata={},
        no_match=_LOADED,
        fit=_fit_of_patcher(patcher, computing, f"sampling {size}"),
        notes=_decoding(patcher, weights),
    )


def inspect_clip(clip: Any) -> Summary:
    """What a CLIP holds in memory."""
    network = clip.cond_stage_model
    weights = list(weights_of(network))
    return summarize(
        f"CLIP: {type(network).__name__}",
        weights,
        type(network).__name__,
        facts=_patches(clip.patcher),
        metadata={},
        no_match=_LOADED,
        fit=_fit_of_patcher(clip.patcher, computing_bytes(0), "encoding a prompt"),
        notes=_decoding(clip.patcher, weights),
    )


def inspect_file(path: str, size: ImageSize) -> Summary:
    """What a file holds, by its header alone."""
    start = time.perf_counter()
    contents = read_header(path)
    seconds = time.perf_counter() - start
    facts = {
        "file": f"{contents.container}, {contents.kind}, quantization {contents.convention}",
        "size": size_text(contents.file_bytes),
    }
    if contents.header_bytes is not None:
        facts["read"] = f"the header, {size_text(contents.header_bytes)} in {seconds:.3f} s"
    if contents.companions:
        nbytes = sum(weight.nbytes for weight in contents.companions)
        facts["beside it"] = f"{size_text(nbytes)} of text encoders, VAE and the like, not counted below"
    reference, problem = _reference(contents)
    return summarize(
        f"File: {os.path.basename(path.rstrip('/'))}",
        contents.weights,
        architecture_of(contents),
        facts=facts,
        metadata=contents.metadata,
        match=None if reference is None else reference.match,
        no_match=problem,
        fit=_fit_of_file(contents, reference, size),
    )


def _reference(contents: FileContents) -> tuple[Reference | None, str]:
    """(the model that ComfyUI would build, or why there is none)"""
    if not contents.is_diffusion_model:
        return None, f"only diffusion models are compared with ComfyUI's, this is a {contents.kind}."
    try:
        return build_reference(contents), ""
    except SnugError as error:
        return None, str(error)


def _patches(patcher: Any) -> dict[str, str]:
    count = len(patcher.patches)
    return {"patches": f"LoRA or other patches on {count} tensors"} if count else {}


def _decoding(patcher: Any, weights: list[StoredWeight]) -> list[str]:
    """What would make the CPU faster that these weights are used on, if anything would."""
    missing = native.unavailable()
    used = patcher.load_device.type == "cpu" and any(weight.format in native.FASTER for weight in weights)
    return [missing] if used and missing else []


def _dtype_text(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# ---- fit -------------------------------------------------------------------------------------------------------------


def _fit_of_patcher(patcher: Any, computing: int | None, work: str) -> Fit:
    blocks = tuple(unit.block for unit in offload_units(patcher.model, BLOCK))
    others = patcher.model_size() - sum(sum(block.sizes) for block in blocks)
    return estimate_fit(device_of(patcher.load_device), Demand(blocks, max(0, others), computing, work))


def _fit_of_file(contents: FileContents, reference: Reference | None, size: ImageSize) -> Fit | None:
    """None for what is not run by itself, such as a LoRA."""
    if not contents.is_diffusion_model and contents.kind != "text encoder":
        return None
    computing, work = computing_bytes(0), "encoding a prompt"
    if contents.is_diffusion_model:
        computing, work = None, f"sampling {size}"
    if reference is not None:
        shape = latent_shape(reference.model.latent_format, size)
        computing = None if shape is None else computing_bytes(sampling_estimate(reference.model, shape))
    nbytes = _loaded(contents, reference)
    blocks = _blocks(contents.weights)
    others = nbytes - sum(sum(block.sizes) for block in blocks)
    device = management.get_torch_device()
    if not contents.is_diffusion_model:
        device = management.text_encoder_device()
    return estimate_fit(device_of(device), Demand(blocks, max(0, others), computing, work))


def _loaded(contents: FileContents, reference: Reference | None) -> int:
    """Bytes of the weights in memory."""
    if reference is None:
        return sum(weight.nbytes for weight in contents.weights)
    return loaded_bytes(contents.weights, reference.dtype, keeps_halves=not _is_for_core(contents))


def _is_for_core(contents: FileContents) -> bool:
    """Whether ComfyUI's own loader takes the file; folders are Snug's in any case."""
    if contents.container != SINGLE_FILE or contents.convention not in ("plain", "core"):
        return False
    try:
        return is_for_core(SafetensorsFile(contents.path))
    except FileFormatError:  # nobody loads it here, a newer ComfyUI would
        return True


def file_weight_bytes(path: str) -> int:
    """Bytes of all weights of a file once they are loaded; what is beside a diffusion model counts as it is stored.

    Raises FileFormatError when the file is damaged.
    """
    contents = read_header(path)
    reference, _ = _reference(contents)
    return _loaded(contents, reference) + sum(weight.nbytes for weight in contents.companions)


def _blocks(weights: Sequence[StoredWeight]) -> tuple[Block, ...]:
    groups = [group for group in group_blocks(weights) if group.name != OTHERS]
    return tuple(Block(name, (nbytes,)) for group in groups for name, nbytes in group.blocks)


def device_of(device: Any) -> Device:
    """What ComfyUI can use of a device: also what its loaded models take there, which it unloads."""
    loaded = sum(
        entry.model_loaded_memory()
        for entry in management.current_loaded_models
        if entry.model is not None and entry.device == device and is_on_gpu(device)
    )
    total = int(management.get_total_memory(device))
    free = min(total, int(management.get_free_memory(device)) + loaded)
    name = management.get_torch_device_name(device) if is_on_gpu(device) else "the CPU"
    return Device(name, total, free, int(management.extra_reserved_memory()), is_on_gpu(device))
