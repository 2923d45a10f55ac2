"""The version of the pack."""

from __future__ import annotations

import re
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def pack_version() -> str | None:
    """By the project's file: the pack is not installed as a package, and Python 3.10 reads no TOML."""
    try:
        found = re.search(r'^version = "([^"]+)"', _PROJECT.read_text("utf-8"), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None
