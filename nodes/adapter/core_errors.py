"""What ComfyUI and torch raise when a file does not fit, told apart from everything else and made short."""

from __future__ import annotations

# ComfyUI's model detection, and torch's report of missing or misshapen tensors.
_ABOUT_THE_FILE = ("Could not detect model type", "loading state_dict")


def is_about_the_file(error: RuntimeError) -> bool:
    """False for everything that ComfyUI handles itself, above all running out of memory."""
    return any(text in str(error) for text in _ABOUT_THE_FILE)


def summary(error: Exception) -> str:
    """One line: torch names every tensor that does not fit on a line of its own, and three are enough."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    lines = lines[1:] or lines
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more
