"""Files under ComfyUI's output folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ...quant_backends.core.errors import SnugError

LONGEST_NAME = 200


def write_report(folder: Path, name: str, suffix: str, text: str) -> Path:
    """Writes a new file `name`_00001`suffix` under `folder`, counting up; returns its path.

    name: may have folders, which are made. It appears only when it is complete.
    Raises SnugError for a name that leads out of the folder, and when the file cannot be written.
    """
    target = _inside(folder, name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".snug-", suffix=".tmp")
        try:
            with open(handle, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            return _place(Path(temporary), target, suffix)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise SnugError(
            f"{name}{suffix} could not be written below ComfyUI's output folder: {error.strerror or error}. Make "
            "room there, or choose another name."
        ) from error


def _inside(folder: Path, name: str) -> Path:
    parts = name.replace("\\", "/").split("/")
    is_odd = any(
        part in ("", ".", "..") or any(ord(letter) < 32 or letter in ':*?"<>|' for letter in part)
        for part in parts
    )
    root = folder.resolve()
    target = root.joinpath(*parts) if not is_odd else root
    # Links inside the folder may lead out of it.
    if is_odd or len(name) > LONGEST_NAME or not target.parent.resolve().is_relative_to(root):
        raise SnugError(
            f"filename_prefix is {name[:LONGEST_NAME]!r}, which is no name of a file under ComfyUI's output folder: "
            "use letters and digits, and / between folders, such as snug/memory."
        )
    return target


def _place(temporary: Path, target: Path, suffix: str) -> Path:
    """Renames it to the first number that is free."""
    number = 1
    while True:
        path = target.with_name(f"{target.name}_{number:05}{suffix}")
        if not os.path.lexists(path):
            os.replace(temporary, path)
            return path
        number += 1
