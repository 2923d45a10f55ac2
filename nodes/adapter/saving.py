"""Saving a MODEL or CLIP as it is in memory: packed weights byte for byte, whatever they are quantized with."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.utils
import torch
from comfy.cli_args import args

from ...quant_backends.core.errors import SnugError
from ...quant_backends.core.version import pack_version
from ...quant_backends.readers.checkpoint_names import DIFFUSION_PREFIX
from ...quant_backends.readers.repairs import rename_qk_norms
from .containers import AUTO, Content, Renamed, Tensors, file_kind, write
from .conversion import NETWORK
from .encoder_gguf import as_gguf
from .model_tensors import LEAVE_OUT, MERGE, REFUSE, ModelTensors
from .output_path import FOLDERS, NUMBER, output_path
from .provenance import Provenance, hashes, provenance_of
from .reweight import unload

# Of the whole of saving, what hashing the source files counts for in the progress bar.
_HASHING = 0.2
_STEPS = 1000
# Beside the text encoders of LTX-2; its connectors are told by the names that they have in its diffusion model.
PROJECTION = "projection"
_CONNECTOR = re.compile(r"(audio|video)_embeddings_connector\.")
_QWEN35 = ".linear_attn.A_log"
# Qwen 3 VL; its largest, MiniMax's, which is cut after this layer, stays as it is.
_DEEPSTACK = "visual.deepstack_merger_list.0.norm.weight"
_MINIMAX_LAYER = "model.layers.49.self_attn.q_proj.weight"


@dataclass(frozen=True)
class SaveSettings:
    """prefix, folder, collision: see `output_path`. container: see `file_kind`. lora: of LORA_CHOICES.

    texts: further metadata by name, such as ComfyUI's "prompt".
    """

    prefix: str
    container: str = AUTO
    lora: str = MERGE
    collision: str = NUMBER
    folder: str = FOLDERS[0]
    texts: Mapping[str, str] = field(default_factory=dict)


def save_model(patcher: Any, settings: SaveSettings) -> list[Path]:
    """Writes the diffusion model of a MODEL into one file; returns its path.

    Raises SnugError when a weight's format does not fit the container, when the name is taken and not to be replaced,
    when the disk is too full, and for what `ModelTensors` refuses.
    """
    tensors = _tensors(patcher, NETWORK, settings)
    renamed = rename_qk_norms(dict.fromkeys(tensors), "scale")  # as the original files call them
    content = _content(tensors, dict(zip(renamed, tensors, strict=True)), _marks(patcher.model))
    config = _config(patcher.model)
    texts = {"config": config} if config else {}
    return _save(patcher, {"": content}, settings, "diffusion_models", texts)


def save_text_encoders(clip: Any, settings: SaveSettings) -> list[Path]:
    """Writes each text encoder of a CLIP into a file of its own; returns the paths.

    Names are Hugging Face's in safetensors, see `as_gguf` for GGUF. Errors as of `save_model` and `as_gguf`.
    """
    tensors = _tensors(clip.patcher, "", settings)
    groups = _encoders(clip.cond_stage_model, tensors)
    tokenizer = _tokenizer_tensors(clip.tokenizer)
    owner = next((prefix for prefix in reversed(groups) if prefix and not prefix.startswith("clip_")), "")

    def tokenizer_of(prefix: str) -> dict[str, torch.Tensor]:
        if tokenizer:
            return tokenizer if prefix == owner else {}
        return _tokenizer_tensors(getattr(clip.tokenizer, prefix, None))  # Newbie's are kept apart

    contents = {
        prefix: replace(
            _content(tensors, _names_in_files(names), tokenizer_of(prefix)),
            encoder=getattr(clip.cond_stage_model, prefix).transformer if prefix else None,
            is_text_encoder=True,
        )
        for prefix, names in groups.items()
    }
    return _save(clip.patcher, contents, settings, "text_encoders", {"format": "pt"})


def _tokenizer_tensors(tokenizer: Any) -> dict[str, torch.Tensor]:
    """What ComfyUI keeps of a tokenizer in state dicts."""
    found = tokenizer.state_dict() if hasattr(tokenizer, "state_dict") else {}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _names_in_files(names: Mapping[str, str]) -> dict[str, str]:
    """ComfyUI moves the vision part of Qwen 3 VL, and all of Qwen 3.5, when it loads one, and tells by the first place
    which model it is; it takes LTX-2's connectors out of a checkpoint."""
    is_qwen35 = any(name.endswith(_QWEN35) for name in names)
    is_moved = is_qwen35 or (_DEEPSTACK in names and _MINIMAX_LAYER not in names)

    def renamed(name: str) -> str:
        if _CONNECTOR.match(name):
            return DIFFUSION_PREFIX + name
        if is_qwen35 and name.startswith("model."):
            return name.replace(
                "model.", "" if name.startswith("model.lm_head.") else "model.language_model.", 1
            )
        return f"model.{name}" if is_moved and name.startswith("visual.") else name

    return {renamed(name): old for name, old in names.items()}


def _content(tensors: ModelTensors, names: Mapping[str, str], more: Tensors) -> Content:
    """What goes into a file; arguments as of `Renamed`."""
    found = (tensors.format_of(name) for name in names.values())
    formats = Counter(name for name in found if name is not None)
    nbytes = sum(map(tensors.nbytes_of, names.values())) + sum(value.nbytes for value in more.values())
    return Content(Renamed(tensors, names, more), dict(formats.most_common()), nbytes)


def _tensors(patcher: Any, prefix: str, settings: SaveSettings) -> ModelTensors:
    keys = [key for key in patcher.patches if isinstance(key, str) and key.startswith(prefix)]
    if keys and settings.lora == REFUSE:
        raise SnugError(
            f"There are LoRAs on {len(keys)} weights; set lora to '{MERGE}' to have them in the file, or to "
            f"'{LEAVE_OUT}' to save the weights without them."
        )
    unload(patcher.model, patcher)  # so that no LoRA is in its weights
    return ModelTensors(patcher, prefix, settings.lora == MERGE)


def _save(
    patcher: Any, files: Mapping[str, Content], settings: SaveSettings, key: str, texts: Mapping[str, str]
) -> list[Path]:
    """files: by what is added to the name where there are several; key: ComfyUI's of the folder."""
    bar = comfy.utils.ProgressBar(_STEPS)
    provenance = provenance_of(patcher)
    backends = [recipe["backend"] for recipe in provenance.recipes if "backend" in recipe]
    backend = backends[-1] if backends else ""
    jobs = []
    for part, content in files.items():  # all names before anything is written
        content = replace(content, backend=backend)
        ending, convention = file_kind(content, settings.container)
        if ending == ".gguf" and content.is_text_encoder:
            content = as_gguf(content)
        prefix = f"{settings.prefix}_{part or PROJECTION}" if len(files) > 1 else settings.prefix
        path = output_path(prefix, ending, settings.folder, key, settings.collision)
        jobs.append((path, content, convention))
    known = {**texts, "snug_provenance": json.dumps(_described(patcher, provenance, settings, bar))}
    known |= {} if args.disable_metadata else settings.texts
    for number, (path, content, convention) in enumerate(jobs):

        def written(done: int, total: int, number: int = number) -> None:
            share = (number + done / max(1, total)) / len(jobs)
            _report(bar, _HASHING + (1 - _HASHING) * share)

        write(path, replace(content, texts=known), convention, written)
    bar.update_absolute(_STEPS)
    return [path for path, _, _ in jobs]


def _described(patcher: Any, provenance: Provenance, settings: SaveSettings, bar: Any) -> dict[str, Any]:
    """Where the weights come from, as JSON can hold it; reads the source files, for their hashes."""
    total = sum(source.size for source in provenance.sources)
    done = 0

    def hashed(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        _report(bar, _HASHING * done / total)

    return {
        "pack": "ComfyUI-Snug",
        "version": pack_version(),
        "source": hashes(provenance, hashed),
        "recipes": list(provenance.recipes),
        "lora": settings.lora if patcher.patches else "none",
    }


def _report(bar: Any, part: float) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
    bar.update_absolute(int(part * _STEPS))


def _marks(model: Any) -> dict[str, torch.Tensor]:
    """Tensors by whose presence ComfyUI knows how a model of Stable Diffusion predicts; they hold nothing."""
    marks: dict[str, torch.Tensor] = {}
    kind = comfy.model_base.ModelType
    sampling: Any = getattr(model, "model_sampling", None)
    if model.model_type == kind.V_PREDICTION:
        marks["v_pred"] = torch.zeros(1)
        if getattr(sampling, "zsnr", False):
            marks["ztsnr"] = torch.zeros(1)
    elif model.model_type == kind.V_PREDICTION_EDM and hasattr(sampling, "sigma_max"):
        marks["edm_vpred.sigma_max"] = torch.tensor([float(sampling.sigma_max)])
        marks["edm_vpred.sigma_min"] = torch.tensor([float(sampling.sigma_min)])
    return marks


def _config(model: Any) -> str | None:
    """What LTX-Video's files say of their sizes."""
    config = dict(getattr(model.model_config, "unet_config", {}))
    if not str(config.get("image_model", "")).startswith("ltx"):
        return None
    simple = {
        name: value for name, value in config.items() if isinstance(value, bool | int | float | str | list)
    }
    simple.pop("image_model")
    return json.dumps({"transformer": simple})


def _encoders(model: torch.nn.Module, names: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Encoder to its tensors: name in its own file to name in the model; "" for what belongs to none."""
    prefixes = [name for name, child in model.named_children() if hasattr(child, "transformer")]
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        part = next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), "")
        inner = name.removeprefix(f"{part}.") if part else name
        groups.setdefault(part, {})[inner.removeprefix("transformer.")] = name
    return groups
