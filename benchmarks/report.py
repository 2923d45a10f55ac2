"""What every benchmark reports: its command line, the environment, Markdown tables, and files of both."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")


def command_line(**paths: str | None) -> str:
    """The command that made the report, without paths of this machine.

    paths: option name and the word to put for its value, or None to leave the option out. The output files
    are always left out.
    """
    replaced = {"markdown": None, "json": None, **paths}
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        option, separator, _ = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in replaced:
            words.append(argument)
            continue
        if not separator:
            next(arguments, None)
        word = replaced[name]
        words += [] if word is None else [option, word]
    return shlex.join(words)


def environment(*packages: str) -> dict[str, str]:
    """What the numbers depend on: processor, system, Python, torch and the versions of `packages`."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", *packages)},
        **_gpu(),
    }


def _gpu() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "GPU": f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda or torch.version.hip}"
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor()
    )


def heading(title: str, command: str, facts: Mapping[str, str]) -> str:
    """The head of a report in Markdown."""
    return "\n".join([f"# {title}", "", f"`{command}`", "", *(f"- {k}: {v}" for k, v in facts.items()), ""])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others (numbers) to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(options: argparse.Namespace, text: str, result: Mapping[str, Any]) -> None:
    """Write the files that `add_output_arguments` was asked for; again after each row, so that a run that is ended
    before its time leaves what it has measured."""
    if options.markdown:
        _replace(options.markdown, text)
    if options.json:
        _replace(options.json, json.dumps(result, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all, as the run may be ended at any moment."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
