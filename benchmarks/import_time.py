"""How much longer ComfyUI takes to start with the pack: importing it and all of its nodes, beyond torch and ComfyUI.

    python benchmarks/import_time.py --comfyui PATH --markdown benchmarks/results/import-time.md \
        --json benchmarks/results/import-time.json

Each run is a process of its own that imports what ComfyUI itself does first (comfy-kitchen, too, which ComfyUI 0.3.75
does not import yet). Processor time, which other programs
disturb least; the table has the best run and the median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import add_output_arguments, command_line, environment, heading, save, table

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.3  # seconds
PROCESS = """
import asyncio, json, sys, time
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [{comfyui!r}, {scripts!r}]
import comfy.options
comfy.options.enable_args_parsing()
import utils.install_util  # before nodes, which puts ComfyUI's folder comfy/ with its utils.py in front
import comfy.sd, comfy_kitchen.tensor, folder_paths, nodes, server
from comfy_api.latest import ComfyExtension, io
from snug_path import register_snug

before, started, wall = set(sys.modules), time.process_time(), time.perf_counter()
extension = asyncio.run(register_snug().comfy_entrypoint())
schemas = [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
result = {{"seconds": time.process_time() - started, "wall": time.perf_counter() - wall, "nodes": len(schemas)}}
result["others"] = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - {{"snug"}})
print(json.dumps(result))
"""


def one_run(comfyui: Path, compiled: str) -> dict[str, Any]:
    """compiled: a folder for compiled modules, which Python keeps beside the sources where it may."""
    code = PROCESS.format(comfyui=str(comfyui), scripts=str(ROOT / "scripts"))
    settings = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui, env=settings)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", required=True, type=Path)
    parser.add_argument("--runs", type=int, default=7)
    add_output_arguments(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as compiled:
        one_run(options.comfyui, compiled)  # compiles the modules and brings them into memory
        runs = [one_run(options.comfyui, compiled) for _ in range(options.runs)]
    rows = []
    for name in ("seconds", "wall"):
        times = [run[name] for run in runs]
        label = "processor time" if name == "seconds" else "elapsed"
        rows.append((label, f"{min(times):.3f}", f"{statistics.median(times):.3f}"))
    command, facts = command_line(comfyui="ComfyUI"), environment("comfy-kitchen")
    facts |= {
        "nodes": str(runs[0]["nodes"]),
        "other packages imported": ", ".join(runs[0]["others"]) or "none",
    }
    best = min(run["seconds"] for run in runs)
    text = heading("Importing the pack", command, facts) + "\n" + table(("", "best s", "median s"), rows)
    text += f"\n\nThe limit is {LIMIT} s of processor time: {'kept' if best <= LIMIT else 'not kept'}.\n"
    print(text)
    save(options, text, {"command": command, "environment": facts, "runs": runs, "limit": LIMIT})


if __name__ == "__main__":
    main()
