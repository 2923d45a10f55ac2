"""Makes every table of speed anew, one after the other, and the list of targets from them.

    python benchmarks/all.py --minutes 12
    python benchmarks/all.py --only flux-blocks flux-lora

On a GPU at full size, in the order of what is worth most, so that a machine that is lent for a quarter of an hour gives
the most; on a CPU at reduced size, as far as a table means something there. Writes benchmarks/results/<name>-cuda.md
and .json, or -cpu, row by row. A table that fails or takes too long leaves the rows that it has and does not stop the
others; what is missing is said at the end.
Needs a ComfyUI in $SNUG_COMFYUI_PATH.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Table:
    """name: of the result files; script; on_gpu, on_cpu: its arguments there, None: not made there. peer: the option
    for a checkout of ComfyUI-GGUF and the path in it. seconds: the most that it may take on a GPU.
    """

    name: str
    script: str
    on_gpu: tuple[str, ...] | None = ()
    on_cpu: tuple[str, ...] | None = ()
    peer: tuple[str, str] | None = None
    seconds: int = 180


TABLES = (
    Table("decoding", "decoding.py", peer=("--peer", "dequant.py"), seconds=110),
    Table("flux-blocks", "flux_blocks.py", ("--peers",), ("--peers",), ("--peer-pack", ""), 240),
    Table("fast-matmul", "fast_matmul.py", seconds=100),
    Table("flux-lora", "flux_lora.py", seconds=70),
    Table("flux-offload", "flux_offload.py", ("--double", "4", "--single", "8"), None, seconds=100),
    Table("flux-compile", "flux_compile.py", seconds=100),
    Table("loading", "loading.py", ("--gib", "4"), ("--gib", "0.7"), seconds=100),
    Table("published-tables", "published_tables.py", seconds=400),
    # Of the models and ratios that a simulated device has in the file without -cuda.
    Table(
        "offload-plan",
        "offload_plan.py",
        ("--models", "Flux, 8-bit", "--ratios", "1", "2", "0.5"),
        seconds=120,
    ),
)


def command(table: Table, cuda: bool, peer: Path | None) -> list[str] | None:
    """What makes the table; None: it is not made on such a machine."""
    arguments = table.on_gpu if cuda else table.on_cpu
    if arguments is None:
        return None
    stem = FOLDER / "results" / f"{table.name}-{'cuda' if cuda else 'cpu'}"
    words = [sys.executable, str(FOLDER / table.script), *arguments]
    if peer and table.peer:
        words += [table.peer[0], str(peer / table.peer[1])]
    return [*words, "--markdown", f"{stem}.md", "--json", f"{stem}.json"]


def run(words: list[str], seconds: float) -> str | None:
    """Runs a command and says what went wrong, if anything."""
    try:
        code = subprocess.run(words, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:.0f} s"
    return f"ended with {code}" if code else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="for all tables together")
    parser.add_argument("--only", nargs="+", choices=[table.name for table in TABLES], help="default: all")
    parser.add_argument("--peer", type=Path, help="folder of a ComfyUI-GGUF checkout")
    options = parser.parse_args()
    cuda, end = torch.cuda.is_available(), time.monotonic() + 60 * options.minutes
    missing = {}
    for table in TABLES:
        words = command(table, cuda, options.peer)
        if words is None or (options.only and table.name not in options.only):
            continue
        left = end - time.monotonic()
        limit = min(left, table.seconds) if cuda else left
        problem = run(words, limit) if left > 0 else "no time left"
        if problem:
            missing[table.name] = problem
    results = FOLDER / "results"
    run(
        [
            sys.executable,
            str(FOLDER / "targets.py"),
            "--markdown",
            str(results / "targets.md"),
            "--json",
            str(results / "targets.json"),
        ],
        60,
    )
    for name, problem in missing.items():
        print(f"missing: {name}: {problem}", file=sys.stderr)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
