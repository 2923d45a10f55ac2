"""Import the pack from its checkout under the name ``snug``.

The checkout's root must never be on ``sys.path``: its folder ``nodes/`` would shadow ComfyUI's ``nodes.py``. Tests,
benchmarks and scripts therefore call :func:`register_snug` and then import ``snug.quant_backends...``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def register_snug() -> ModuleType:
    """Make ``import snug`` work in this process and return the package. Calling it again is harmless."""
    if "snug" in sys.modules:
        return sys.modules["snug"]
    spec = importlib.util.spec_from_file_location(
        "snug", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"no package at {ROOT}")
    package = importlib.util.module_from_spec(spec)
    sys.modules["snug"] = package
    spec.loader.exec_module(package)
    return package
