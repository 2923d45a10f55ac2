"""What somebody who is to help needs to know: versions, devices, backends, start options and the last minute.

Free of secrets: options that are texts (folders, addresses, keys) are only named, and the user's folder is "~".
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable
from enum import Enum
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from comfy.cli_args import args, parser

from ...quant_backends.core.version import pack_version
from ...quant_backends.registry import BACKENDS
from .accounting import Sample
from .devices import driver_version
from .process import telemetry
from .report import event_data, sample_data

MINUTE = 60.0
GIVEN = "(given)"
_PACKAGES = (
    "comfy-kitchen",
    "comfy-aimdo",
    "comfyui-frontend-package",
    "libgguf",
    "numpy",
    "safetensors",
    "triton",
)


def diagnostics() -> dict[str, Any]:
    known = telemetry()
    now = known.take()
    minute = [sample for _, sample in known.history.since() if sample.time >= now.time - MINUTE]
    found = {
        "time": now.time,
        "versions": _versions(),
        "options": _options(),
        "devices": [
            {"name": parts.name, "title": parts.title, "total": parts.total} for parts in now.devices
        ],
        "backends": [
            {"name": name, "title": backend.title, "unavailable": backend.unavailable()}
            | ({"version": _version(backend.package)} if backend.package else {})
            for name, backend in BACKENDS.items()
        ],
        "counters": known.events.counters(),
        "events": [event_data(event) for event in known.events.between(now.time - MINUTE, time.time())],
        "last_minute": [sample_data(sample) for sample in [*_each_second(minute), now]],
    }
    return without_home(found)


def environment() -> dict[str, Any]:
    """What figures measured here depend on: versions and the device that ComfyUI computes on."""
    device = telemetry().take().devices[0]
    processor = {"processor": platform.processor() or platform.machine()}
    return {"device": device.title, "memory": device.total, **processor, **_versions()}


def without_home(value: Any) -> Any:
    """JSON data with "~" in place of the user's folder."""
    home = json.dumps(str(Path.home()))[1:-1]
    return json.loads(json.dumps(value).replace(home, "~")) if len(home) > 1 else value


def _each_second(samples: Iterable[Sample]) -> list[Sample]:
    """Of every second the sample in which the first device holds most."""
    found: dict[int, Sample] = {}
    for sample in samples:
        best = found.get(int(sample.time))
        if best is None or sample.devices[0].used > best.devices[0].used:
            found[int(sample.time)] = sample
    return list(found.values())


def _versions() -> dict[str, str | None]:
    return {
        "snug": pack_version(),
        "comfyui": _comfyui_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "gpu_driver": driver_version(),
        "system": platform.platform(),
        **{package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError):
        return None


def _comfyui_version() -> str | None:
    try:
        return import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return None


def _options() -> dict[str, Any]:
    """Those that ComfyUI was started with."""
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    return {name: _shown(value) for name, value in sorted(given.items())}


def _shown(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float):
        return value
    if (
        isinstance(value, list | tuple | set | frozenset)
        and value
        and not any(isinstance(i, str) for i in value)
    ):
        return [_shown(item) for item in value]
    return GIVEN
