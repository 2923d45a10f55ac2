"""Where a file is saved: below ComfyUI's output folder or among the models, under a name that is free or replaced."""

from __future__ import annotations

import os
import time
from pathlib import Path

import folder_paths

from ...quant_backends.core.errors import SnugError

OUTPUT, MODELS = "output folder", "models folder"
FOLDERS = (OUTPUT, MODELS)
NUMBER, REPLACE, FAIL = "add a number", "replace", "refuse"
COLLISIONS = (NUMBER, REPLACE, FAIL)


def output_path(prefix: str, ending: str, folder: str, key: str, collision: str) -> Path:
    """The path of a file to be written; its folder is made.

    prefix: what the user wrote: a name, with folders before it and ComfyUI's %year% and the like in it. ending:
    ".gguf". folder: of FOLDERS; key: ComfyUI's folder key, for MODELS. collision: of COLLISIONS; with NUMBER the name
    is numbered as ComfyUI numbers its files.
    Raises SnugError for a name that leads out of the folder or is none, and, with FAIL, when there is such a file.
    """
    root = Path(folder_paths.get_output_directory() if folder == OUTPUT else _models_folder(key)).resolve()
    name = _with_date(prefix).replace("\\", "/")
    for known in (".safetensors", ".gguf"):
        name = name.removesuffix(known)
    if folder == MODELS:
        name = name.removeprefix(f"{key}/")
    target = (root / name).resolve()
    if not name or name.endswith("/") or root == target or root not in target.parents:
        raise SnugError(
            f"The file name {prefix!r} is no name inside {root}; write a name such as {key}/my-model, without '..'."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if collision == NUMBER:
        return target.parent / f"{target.name}_{_next_number(target):05}_{ending}"
    path = target.parent / f"{target.name}{ending}"
    if path.exists() and collision == FAIL:
        raise SnugError(
            f"{path} exists already; choose another name, or set if_exists to '{NUMBER}' or '{REPLACE}'."
        )
    return path


def _models_folder(key: str) -> str:
    """The folder that is called like its key, as ComfyUI also looks into older ones; else the first."""
    folders = folder_paths.get_folder_paths(key)
    return next((folder for folder in folders if os.path.basename(folder) == key), folders[0])


def _next_number(target: Path) -> int:
    start = f"{target.name}_"
    found = [
        int(digits)
        for name in os.listdir(target.parent)
        if name.startswith(start) and (digits := name[len(start) :].split("_")[0]).isdecimal()
    ]
    return max(found, default=0) + 1


def _with_date(prefix: str) -> str:
    now = time.localtime()
    parts = {"year": now.tm_year, "month": now.tm_mon, "day": now.tm_mday}
    parts |= {"hour": now.tm_hour, "minute": now.tm_min, "second": now.tm_sec}
    for name, value in parts.items():
        prefix = prefix.replace(f"%{name}%", f"{value:02}")
    return prefix.strip()
