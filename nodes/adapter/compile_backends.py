"""What torch.compile needs on this machine, and its failures as sentences."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.types
import torch._inductor
from torch._dynamo.exc import TorchDynamoException

MODES = ("default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead")
# The backends that know MODES.
MODES_OF = ("inductor",)
# They compile nothing, and tell a problem of the compiler from one of the model.
DEBUG_BACKENDS = ("aot_eager", "eager")
# Those that torch has besides, and the package that each needs.
PACKAGES = {"openxla": "torch_xla", "tvm": "tvm"}

COMPILER_ERRORS: tuple[type[Exception], ...] = (TorchDynamoException,)

_ADVICE = "tick fallback_to_eager or bypass this node to run the model uncompiled"


def backends() -> list[str]:
    """Names for the node: inductor, what else torch offers and can work here, and two for finding errors.

    "cudagraphs" records the copies of weights as they are then and would repeat them forever. torch's own list loads
    every backend, which takes seconds when ComfyUI starts.
    """
    others = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is not None]
    others += [entry.name for entry in importlib.metadata.entry_points(group="torch_dynamo_backends")]
    return ["inductor", *sorted(set(others) - {"inductor", *DEBUG_BACKENDS}), *DEBUG_BACKENDS]


def compile_options(
    backend: str, mode: str, guards_to_keep: Callable[[Sequence[Any]], list[bool]]
) -> dict[str, Any]:
    """`options` of torch.compile, which stand for its `mode` too; torch before 2.8 cannot choose guards."""
    options = dict(torch._inductor.list_mode_options(mode)) if backend in MODES_OF else {}
    if hasattr(torch._dynamo.types, "GuardFilterEntry"):
        options["guard_filter_fn"] = guards_to_keep
    return options


def missing_for(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot compile for `device` on this machine, as a sentence; None when nothing is known."""
    if not torch._dynamo.is_dynamo_supported():  # pyright: ignore[reportPrivateImportUsage]
        return f"torch.compile of this PyTorch does not support this Python; {_ADVICE}."
    package = _missing_package(device) if backend == "inductor" else None
    if package is None:
        return None
    return f"The compile backend '{backend}' needs {package}; install it and restart ComfyUI, or {_ADVICE}."


def _missing_package(device: torch.device) -> str | None:
    """What inductor would look for in vain."""
    if device.type == "cpu":
        return None if _has_cpp_compiler() else "a C++ compiler, and none was found (g++, clang or MSVC)"
    if device.type in ("cuda", "xpu"):
        if importlib.util.find_spec("triton") is None:
            package = "triton-windows" if sys.platform == "win32" else "triton"
            return f"Triton, which is not installed (pip install {package})"
        if sys.platform != "win32" and not any(shutil.which(name) for name in _c_compilers()):
            return "a C compiler, and none was found (gcc or clang)"
    return None


def _c_compilers() -> list[str]:
    return [name for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name]


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except (InvalidCxxCompiler, RuntimeError):
        return False


def sentence(error: Exception, backend: str, what: str, fullgraph: bool) -> str:
    """A failure of torch.compile as one sentence for the user."""
    cause = _first_line(getattr(error, "inner_exception", None) or error)
    explanation = re.search(r"Explanation: (.+)", str(error))  # of what cannot be traced
    if explanation is not None:
        cause += f": {explanation[1].strip().rstrip('.')}"
    advice = f"untick fullgraph, {_ADVICE}" if fullgraph else _ADVICE
    return f"{what} could not be compiled by '{backend}' ({cause}); {advice}."


def _first_line(error: Any) -> str:
    lines = (line.strip().rstrip(".:") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
