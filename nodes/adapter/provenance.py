"""Where the weights of a MODEL or CLIP come from: the files they were loaded from, and what was done to them since.

Noted on the patcher, whose clones carry it on; written into the files that Snug saves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .folders import files_of

ATTACHMENT = "snug_provenance"
_CHUNK = 16 << 20  # bytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """size: bytes; modified: nanoseconds; as they were when the file was loaded."""

    path: str
    size: int
    modified: int


# Reading a large file takes a while: what it came to last time.
_known: dict[SourceFile, str] = {}


@dataclass(frozen=True, slots=True)
class Provenance:
    """sources: files that the weights were loaded from, none where that is not known; recipes: what was done to them,
    each as JSON can hold it, in order.
    """

    sources: tuple[SourceFile, ...] = ()
    recipes: tuple[dict[str, Any], ...] = ()


def note_sources(patcher: Any, paths: Iterable[str]) -> None:
    """Notes that the weights of a patcher have just been loaded from these files or folders."""
    patcher.set_attachments(ATTACHMENT, Provenance(_sources(paths)))


def with_recipe(patcher: Any, recipe: dict[str, Any]) -> None:
    """Notes one more thing that was done to the weights."""
    found = provenance_of(patcher)
    patcher.set_attachments(ATTACHMENT, replace(found, recipes=(*found.recipes, recipe)))


def provenance_of(patcher: Any) -> Provenance:
    """What is known; newer ComfyUI's own loaders say which file it was."""
    found = patcher.get_attachment(ATTACHMENT)
    if found is not None:
        return found
    _, arguments = (getattr(patcher, "cached_patcher_init", None) or (None, ()))[:2]
    first = arguments[0] if arguments else ()
    paths = [first] if isinstance(first, str) else first if isinstance(first, list | tuple) else []
    return Provenance(_sources(path for path in paths if isinstance(path, str)))


def hashes(found: Provenance, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """Name and SHA-256 of the source files, as JSON can hold them; one that has changed or gone has none.

    progress: called with the bytes that were read, may raise to stop.
    """
    entries: list[dict[str, Any]] = []
    for source in found.sources:
        entry: dict[str, Any] = {"file": Path(source.path).name, "bytes": source.size}
        if _sources([source.path]) == (source,):
            entry["sha256"] = _sha256(source, progress)
        entries.append(entry)
    return entries


def _sha256(source: SourceFile, progress: Callable[[int], None]) -> str:
    if source not in _known:
        digest = hashlib.sha256()
        with open(source.path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                progress(len(chunk))
        _known[source] = digest.hexdigest()
    return _known[source]


def _sources(paths: Iterable[str]) -> tuple[SourceFile, ...]:
    files = [file for path in paths for file in files_of(path)]
    stats = [(file, os.stat(file)) for file in files]
    return tuple(SourceFile(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
