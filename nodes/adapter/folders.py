"""Which files the loaders list, and where they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import folder_paths

from ...quant_backends.core.errors import SnugError
from ...quant_backends.readers.diffusers_layout import list_diffusers_folders
from ...quant_backends.readers.gguf_file import looks_like_gguf

# What a combo of files offers where there are none; the page shows an empty list as "undefined".
# web/telemetry/graph.mjs knows this text as well.
NO_FILES = "no files in models/"


@dataclass(frozen=True, slots=True)
class _Library:
    """Files of one kind. key: ComfyUI's folder key. gguf_key: ComfyUI lists no .gguf files under its own; for
    models and text encoders other packs share this one; empty where there are none. how: to get a first one.
    """

    what: str
    key: str
    gguf_key: str = ""
    how: str = "put a .safetensors or .gguf file there"

    def files(self) -> list[str]:
        names: set[str] = set()
        for key, extensions in self._extensions().items():
            names.update(n for n in folder_paths.get_filename_list(key) if n.lower().endswith(extensions))
        return sorted(names)

    def choices(self, names: Sequence[str]) -> list[str]:
        """For a combo without a default: the names, or where files belong if there are none."""
        return list(names) or [NO_FILES + self.key]

    def find(self, name: str) -> str:
        for key, extensions in self._extensions().items():
            path = folder_paths.get_full_path(key, name) if name.lower().endswith(extensions) else None
            if path is not None:
                return path
        folders = ", ".join(folder_paths.get_folder_paths(self.key))
        if name == NO_FILES + self.key:
            raise SnugError(
                f"There was no {self.what} to choose in {folders}: {self.how}, press R in ComfyUI and choose it."
            )
        raise SnugError(
            f"The {self.what} '{name}' was not found in {folders}; put the file there, or press R in ComfyUI "
            f"to refresh the list and choose another one."
        )

    def _extensions(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {self.key: (".safetensors", ".sft")}
        return {**found, self.gguf_key: (".gguf",)} if self.gguf_key else found


DIFFUSION_MODELS = _Library("diffusion model", "diffusion_models", "unet_gguf")
TEXT_ENCODERS = _Library("text encoder", "text_encoders", "clip_gguf")
LORAS = _Library("LoRA", "loras", "snug_loras_gguf")
CHECKPOINTS = _Library("checkpoint", "checkpoints", "snug_checkpoints_gguf")
CONTROLNETS = _Library("ControlNet", "controlnet", "snug_controlnet_gguf")
VAES = _Library("VAE", "vae")
# A folder of Snug's own.
CALIBRATIONS = _Library("calibration", "snug_calibrations", how="save one with Calibrate (Snug)")


def register() -> None:
    """Makes the folder keys for .gguf files known, unless another pack already has.

    They share ComfyUI's own lists of folders (the list objects themselves), so folders that are added later
    through extra_model_paths.yaml are seen as well.
    """
    known = folder_paths.folder_names_and_paths
    for library in (DIFFUSION_MODELS, TEXT_ENCODERS, LORAS, CHECKPOINTS, CONTROLNETS):
        if library.gguf_key not in known:
            known[library.gguf_key] = (known[library.key][0], {".gguf"})
    if CALIBRATIONS.key not in known:
        folder = os.path.join(folder_paths.models_dir, CALIBRATIONS.key)
        known[CALIBRATIONS.key] = ([folder], {".safetensors"})


def diffusion_model_files() -> list[str]:
    """Names of the diffusion models that Snug can load, relative to their folders, sorted.

    A folder in diffusers' layout is listed as one entry that ends in "/", in place of the files in it.
    """
    folders = [f"{name}/" for root in _diffusers_roots() for name in list_diffusers_folders(root)]
    single = [
        name for name in DIFFUSION_MODELS.files() if not name.replace("\\", "/").startswith(tuple(folders))
    ]
    return sorted({*single, *folders})


def find_diffusion_model(name: str) -> str:
    """Full path of a listed file or folder. Raises SnugError when it is gone."""
    if name.endswith("/"):
        inside = os.path.relpath(os.path.join("/", name), "/")  # as ComfyUI keeps names inside their root
        for root in _diffusers_roots() if inside != os.curdir else ():
            if os.path.isdir(os.path.join(root, inside)):
                return os.path.join(root, inside)
    return DIFFUSION_MODELS.find(name)


def _diffusers_roots() -> list[str]:
    """Where folders in diffusers' layout are looked for: among the models, and where ComfyUI has them."""
    known = folder_paths.folder_names_and_paths
    return [root for key in (DIFFUSION_MODELS.key, "diffusers") if key in known for root in known[key][0]]


def files_of(path: str) -> list[str]:
    """The files that a model consists of: the path itself, or everything in a folder; only those that exist, as a
    link in a download cache may lead nowhere."""
    found = [path]
    if os.path.isdir(path):
        found = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return [file for file in found if os.path.isfile(file)]


def state_on_disk(path: str) -> tuple[Any, ...]:
    """Changes when a file does, or one of the files of a folder."""
    return tuple((file, (stat := os.stat(file)).st_mtime_ns, stat.st_size) for file in files_of(path))


def parts_on_disk(paths: Iterable[str]) -> tuple[Any, ...]:
    """Changes when a file that could be the vision part of one of these text encoders comes, goes or changes."""
    beside = {os.path.dirname(path) for path in paths if looks_like_gguf(path)}
    names = sorted(os.path.join(folder, name) for folder in beside for name in os.listdir(folder))
    return tuple(state_on_disk(name) for name in names if name.lower().endswith(".gguf"))


def text_encoder_files() -> list[str]:
    """Names of the text-encoder files that Snug can load, vision parts included, sorted."""
    return TEXT_ENCODERS.files()


def find_text_encoder(name: str) -> str:
    """Full path of a listed file. Raises SnugError when it is gone."""
    return TEXT_ENCODERS.find(name)


def new_calibration_path(name: str) -> str:
    """Where a calibration called `name` is to be saved: a number is added where the name is taken.

    Makes the folder. Raises SnugError for a name that leads out of it.
    """
    root = folder_paths.get_folder_paths(CALIBRATIONS.key)[0]
    stem = name.strip().removesuffix(".safetensors").strip()
    wanted = os.path.abspath(os.path.join(root, stem))
    if not os.path.basename(stem) or os.path.commonpath([wanted, os.path.abspath(root)]) != os.path.abspath(
        root
    ):
        raise SnugError(
            f"A calibration cannot be saved as '{name}': that is not a name inside {root}; write one such as "
            f"flux-portraits or flux/portraits."
        )
    os.makedirs(os.path.dirname(wanted), exist_ok=True)
    path, number = f"{wanted}.safetensors", 2
    while os.path.exists(path):
        path, number = f"{wanted}-{number}.safetensors", number + 1
    return path
