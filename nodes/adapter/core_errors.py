"""What ComfyUI and torch raise when a file does not fit, told apart from everything else and made short."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ...quant_backends.core.errors import SnugError

# What calculating with tensors of a wrong name, shape or dtype ends in.
_CAUGHT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
# ComfyUI's model detection, and torch's report of missing or misshapen tensors.
_ABOUT_THE_FILE = ("Could not detect model type", "loading state_dict")
# What ComfyUI handles itself: it unloads models and tries again, or stops.
_ABOUT_THE_DEVICE = ("out of memory", "not enough memory", "allocate memory", "CUDA", "HIP", "MPS")
# The package that this module lies in, whatever ComfyUI calls it.
_SNUG = __name__.removesuffix("nodes.adapter.core_errors")


@contextmanager
def refused_as(refusal: Callable[[Exception], SnugError]) -> Iterator[None]:
    """Raises `refusal(error)` in place of an error that ComfyUI raises about a file; all others pass."""
    try:
        yield
    except _CAUGHT as error:
        if not is_about_the_file(error):
            raise
        raise refusal(error) from error


def is_about_the_file(error: Exception) -> bool:
    """Whether ComfyUI's own code met something in a file that it cannot use.

    False for what ComfyUI handles itself, above all running out of memory, and for errors in Snug's own code, which
    must be seen as they are.
    """
    text = str(error)
    if any(known in text for known in _ABOUT_THE_FILE):
        return True
    if isinstance(error, RuntimeError) and any(word in text for word in _ABOUT_THE_DEVICE):
        return False
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packs = [name for name in modules if name.startswith(("comfy.", _SNUG))]
    return bool(packs) and packs[-1].startswith("comfy.")


def summary(error: Exception) -> str:
    """One line: torch names every tensor that does not fit on a line of its own, and three are enough."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    lines = lines[1:] or lines or [type(error).__name__]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more
