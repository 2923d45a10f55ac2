"""The command lines that people install packs with, in an environment of their own outside the checkout.

It is made once, in Snug's cache, from PyPI; their versions are written here alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

TOOLS = ("comfyui-manager==4.3", "comfy-cli==1.23.0")


def tools_folder() -> Path:
    """Where `comfy` and `cm-cli` are; skips where they cannot be had."""
    cache = os.environ.get("SNUG_CACHE")
    if not cache:
        pytest.skip("SNUG_CACHE is not set: run ./test")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = Path(cache) / "tools" / "-".join([version, *TOOLS]).replace("==", "-")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    if not (folder / "complete").exists():
        _make(folder, programs)
    return programs


def _make(folder: Path, programs: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = programs / ("python.exe" if os.name == "nt" else "python")
    place = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    # ComfyUI's Manager runs where ComfyUI does: it sees the packages of the environment of the tests.
    Path(place.strip(), "environment.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", *TOOLS]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{', '.join(TOOLS)} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    (folder / "complete").touch()
