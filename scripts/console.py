"""What the command-line scripts share: timed steps, quiet child processes with readable failures, a lock."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


class ScriptError(Exception):
    """Something a person has to act on; the text says what failed, the command and what to do."""


def say(text: str) -> None:
    """Progress goes to standard error: standard output belongs to results (``--print-env``, tables)."""
    print(text, file=sys.stderr, flush=True)


class Steps:
    """Numbered progress lines: ``[2/6] torch ... 31 s``."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        self.done += 1
        print(f"[{self.done}/{self.total}] {title} ... ", end="", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            yield
        except BaseException:
            print("failed", file=sys.stderr, flush=True)
            raise
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def run_logged(
    command: Sequence[str | Path], log: Path, advice: str, env: dict[str, str] | None = None
) -> None:
    """Run a command with its output in ``log``; raise ScriptError with the log's tail when it fails."""
    words = [str(word) for word in command]
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {shlex.join(words)}\n")
        file.flush()
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env)
        except OSError as error:
            raise ScriptError(f"{shlex.join(words)} could not be started: {error}. {advice}") from error
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in tail_lines(log, 15))
        raise ScriptError(
            f"exit status {done.returncode} from\n    {shlex.join(words)}\n{tail}\n{advice} Full log: {log}"
        )


def tail_lines(log: Path, count: int) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` across processes; wait, and say so, while another one holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        announced = False
        while not _try_lock(file.fileno()):
            if not announced:
                say(f"another run is preparing the environment, waiting for it ({path})")
                announced = True
            time.sleep(0.5)
        yield  # the operating system drops the lock when the file closes, also when this process dies


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
