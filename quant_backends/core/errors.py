"""Errors of the core. Each reads as one sentence: what, where, found, expected, what to do next."""

from __future__ import annotations

import os


class SnugError(Exception):
    """Base of every error that Snug raises on purpose; `str()` is one sentence meant for the user."""


class FileFormatError(SnugError):
    """A file on disk is damaged, incomplete or of a kind that Snug does not read.

    `path` is the file, `problem` what was found against what was expected (no final full stop),
    `hint` what the user can do about it; all three stay available as attributes.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str, hint: str = "") -> None:
        self.path = os.fspath(path)
        self.problem = problem
        self.hint = hint
        super().__init__(self.path, problem, hint)

    def __str__(self) -> str:
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.path}: {self.problem}{hint}."
