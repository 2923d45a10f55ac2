"""A file that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import SnugError

MARGIN = 16 << 20  # bytes left for headers and padding


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, which takes its name at the end; removed when anything is raised.

    What processes that were killed left of earlier tries is removed as well.
    """
    _remove_leftovers(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_disk_space(target: Path, needed: int) -> None:
    """SnugError when the disk of `target` has no room for so many bytes."""
    free = shutil.disk_usage(target.parent).free
    if free < needed + MARGIN:
        raise SnugError(
            f"{target} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; "
            f"free some space or write to another disk."
        )


def _remove_leftovers(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-[0-9a-f]+\.part")
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            with contextlib.suppress(OSError):  # of another user, or open on Windows
                path.unlink()


def _is_running(process: int) -> bool:
    if (
        os.name == "nt"
    ):  # where the signal below would end it; files that are open cannot be removed there anyway
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
