"""Where the denoiser lies in a folder in diffusers' layout, and what other folders are.

A component folder has `config.json` and `diffusion_pytorch_model[.variant].safetensors`, or shards with
`diffusion_pytorch_model.safetensors.index[.variant].json`; a pipeline folder has `model_index.json` and its components
in folders of their own (diffusers: utils/constants.py, models/modeling_utils.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import FileFormatError
from .gguf_values import shown
from .json_file import read_json_object
from .safetensors_file import PICKLE_HINT

CONFIG, PIPELINE, CLASS = "config.json", "model_index.json", "_class_name"
MAX_CONFIG_BYTES = 1 << 20
# A pipeline's denoisers; the second transformer is Wan 2.2's for low noise, chosen by its own folder.
DENOISERS = ("transformer", "unet")
EXTRA_DENOISERS = ("transformer_2",)
# How deep models lie under a models folder: "organisation/model/transformer", a cache's "snapshots/<hash>".
MAX_DEPTH = 5
MAX_FOLDERS = 20_000

_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.([\w-]+))?\.safetensors(\.index(?:\.([\w-]+))?\.json)?")
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+\.")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Variants in the order in which they are taken where the plain weights are missing.
_VARIANTS = ("", "bf16", "fp16")

# Classes that are no denoisers: how they are called, what they are, what to do.
_OTHERS = (
    (
        re.compile(r"Autoencoder|AsymmetricAutoencoder|VQModel|ConsistencyDecoder|\w*VAE"),
        "a VAE",
        "put its safetensors file into models/vae and load it with a VAE loader",
    ),
    (
        re.compile(r"\w*(ControlNet|Adapter)"),
        "a ControlNet or adapter",
        "put its safetensors file into models/controlnet and load it with a ControlNet loader",
    ),
    (
        re.compile(r"\w*Scheduler"),
        "a scheduler",
        "choose the folder of the pipeline or of its transformer or unet",
    ),
)
_NO_PIPELINE = "choose the folder of a pipeline, or of its transformer or unet"


def component_folder(path: Path) -> Path:
    """The folder with the denoiser's config.json: `path` itself, or a pipeline's transformer or unet."""
    if not path.is_dir():
        raise FileFormatError(path, "the folder is missing", "check the path")
    if (path / CONFIG).is_file():
        return path
    if not (path / PIPELINE).is_file():
        found = "holds no config.json" if _names(path) else "is empty"
        raise FileFormatError(
            path, f"the folder {found}, expected a model in diffusers' layout", _NO_PIPELINE
        )
    read_json_object(path / PIPELINE, MAX_CONFIG_BYTES)
    for name in DENOISERS:
        if (path / name / CONFIG).is_file():
            return path / name
    raise FileFormatError(
        path,
        "the pipeline has no folder transformer or unet with a config.json",
        "download that folder as well, or choose another version of the model",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The denoiser's config.json; FileFormatError when it is damaged or tells of something else."""
    config = read_json_object(folder / CONFIG, MAX_CONFIG_BYTES)
    kind = config.get(CLASS)
    if kind is None and ("architectures" in config or "model_type" in config):
        raise FileFormatError(
            folder,
            f"the folder is a text encoder or another model of transformers ({shown(str(config.get('model_type')))})",
            "put its safetensors file into models/text_encoders and load it with Load Text Encoders (Snug)",
        )
    if not isinstance(kind, str):
        raise FileFormatError(folder, f"its config.json does not name a model class in {CLASS}", _NO_PIPELINE)
    for pattern, what, hint in _OTHERS:
        if pattern.match(kind):
            raise FileFormatError(
                folder, f"the folder is {what} ({shown(kind)}), expected a diffusion model", hint
            )
    return config


def weights_file(folder: Path) -> Path:
    """The safetensors file of a component, or the index of its shards; the plain ones before variants."""
    names = _names(folder)
    found = []
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match and not _SHARD_NUMBER.search(name):
            variant = match[1] or match[3] or ""
            rank = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
            found.append((rank, variant, match[2] is None, name))
    if found:
        return folder / min(found)[-1]
    if any(_SHARD_NUMBER.search(name) and name.endswith(".safetensors") for name in names):
        problem, hint = "the index.json of the model's shards is missing", "download it into this folder"
    elif any(name.endswith(_PICKLES) for name in names):
        problem, hint = (
            "the folder holds weights only as PyTorch pickles",
            PICKLE_HINT.replace("it ", "them ", 1),
        )
    elif files := [name for name in names if name.endswith((".gguf", ".safetensors"))]:
        problem = f"the folder has no diffusion_pytorch_model.safetensors, but {shown(files[0])}"
        hint = "put that file into models/diffusion_models and choose it there"
    else:
        problem, hint = "the folder holds no weights", "download its safetensors files"
    raise FileFormatError(folder, problem, hint)


def is_diffusers_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a diffusion model or a pipeline in diffusers' layout; reads no weights."""
    try:
        folder = component_folder(Path(path))
        read_config(folder)
        weights_file(folder)
    except FileFormatError:
        return False
    return True


def list_diffusers_folders(root: str | os.PathLike[str]) -> list[str]:
    """Names relative to `root`, with "/", of all such folders under it, sorted.

    A pipeline stands for its denoiser; one with two has each in the list. What cannot be read is left out.
    """
    found: set[str] = set()
    for relative, folder in _folders(Path(root)):
        if not is_diffusers_folder(folder):
            continue
        extra = [name for name in EXTRA_DENOISERS if is_diffusers_folder(folder / name)]
        if extra and not (folder / CONFIG).is_file():
            found.update(f"{relative}/{name}" for name in (component_folder(folder).name, *extra))
        else:
            found.add(relative)
    return sorted(found)


def _folders(root: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of folders that may be models, top down; not those inside such a folder."""
    waiting, seen = [("", root, 0)], 0
    while waiting and seen < MAX_FOLDERS:
        relative, folder, depth = waiting.pop()
        seen += 1
        if relative and any((folder / name).is_file() for name in (CONFIG, PIPELINE)):
            yield relative, folder
        elif depth < MAX_DEPTH:
            for name in _names(folder):
                if not name.startswith(".") and (folder / name).is_dir():
                    waiting.append((f"{relative}/{name}" if relative else name, folder / name, depth + 1))


def _names(folder: Path) -> list[str]:
    """The names in a folder; none when it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
