"""What the command line prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

# Without tqdm or a terminal: a line for each tenth, at most every so many seconds.
SECONDS_BETWEEN_LINES = 2.0


class Progress(Protocol):
    """(done, total), in whatever unit; may raise to cancel."""

    def __call__(self, done: int, total: int, /) -> None: ...


def show(text: str) -> None:
    """A result."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Anything that is not the result."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def progress(what: str, unit: str = "") -> Iterator[Progress]:
    """A bar while the block runs: tqdm's where it is installed and somebody looks, else plain lines.

    unit: "B" counts bytes.
    """
    tqdm = _tqdm() if sys.stderr.isatty() else None
    if tqdm is None:
        yield _Lines(what)
        return
    with tqdm(desc=what, unit=unit or "it", unit_scale=unit == "B", unit_divisor=1024, leave=False) as bar:

        def update(done: int, total: int, /) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _tqdm() -> Any:
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError:
        return None


class _Lines:
    def __init__(self, what: str) -> None:
        self.what = what
        self.tenth = 0
        self.last = time.monotonic()

    def __call__(self, done: int, total: int, /) -> None:
        tenth, now = 10 * done // max(1, total), time.monotonic()
        if tenth > self.tenth and now - self.last >= SECONDS_BETWEEN_LINES:
            self.tenth, self.last = tenth, now
            note(f"{self.what}: {100 * done // max(1, total)} %")
