"""Arguments, and what becomes of errors: one sentence on standard error and an exit code.

0 done; 1 it failed, or a comparison found more than allowed; 2 wrong arguments; 130 cancelled with Ctrl-C, 143 by the
system. Whatever the end, no half-written file is left.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from ..core.errors import SnugError
from . import compare, convert, inspect, quantize
from .console import note

COMMANDS = (quantize, inspect, convert, compare)
FAILED, CANCELLED, TERMINATED = 1, 128 + signal.SIGINT, 128 + signal.SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. arguments: without the program's name, None for those of the process."""
    parser = argparse.ArgumentParser(
        prog="snug",
        description="Quantize, inspect, convert and compare files of diffusion models and text encoders.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    before = _terminate_by_exception()
    try:
        return options.run(options)
    except SnugError as error:
        note(f"snug: {error}")
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        note(f"snug: {where}{error.strerror or error}.")
        return FAILED
    except KeyboardInterrupt:
        note("snug: cancelled; nothing was left behind.")
        return CANCELLED
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate_by_exception() -> signal.Handlers | int | None:
    """Lets `kill` and a machine that shuts down unwind the program, so that temporary files go."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        sys.exit(TERMINATED)

    try:
        return signal.signal(signal.SIGTERM, terminate)  # pyright: ignore[reportReturnType]
    except ValueError:  # not the main thread
        return None
