"""JSON files that lie beside weights, read in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import FileFormatError
from .gguf_values import REDOWNLOAD
from .safetensors_file import strict_json


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes`; FileFormatError when it is missing, larger or anything else."""
    try:
        if not path.is_file():  # a pipe, say, would never end
            raise FileFormatError(path, "the file is missing or no ordinary file", REDOWNLOAD)
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        problem = f"the file cannot be opened ({error.strerror})"
        raise FileFormatError(path, problem, "check its permissions") from error
    if len(content) > max_bytes:
        raise FileFormatError(path, f"the file has more than {max_bytes} bytes", REDOWNLOAD)
    try:
        found = strict_json(content)
    except ValueError as error:
        raise FileFormatError(path, f"the file is not valid JSON ({error})", REDOWNLOAD) from error
    if not isinstance(found, dict):
        raise FileFormatError(path, "the file is not a JSON object", REDOWNLOAD)
    return found
