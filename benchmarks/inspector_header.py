r"""Inspecting a file of 12 GB by its header: how long it takes, and how much of the file is read.

    python benchmarks/inspector_header.py --comfyui ~/ComfyUI --markdown benchmarks/results/inspector-header.md \
        --json benchmarks/results/inspector-header.json

The files have the header of Flux.1 dev and nothing else: they are sparse. "header" is reading and checking it,
"whole" is Model Inspector with the model that ComfyUI would build to compare with. Each is the fastest of several
runs, in seconds on the clock and of the processor; only the latter says something on a busy machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from report import add_output_arguments, command_line, environment, heading, save, table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]
from snug_path import register_snug  # noqa: E402
from tiny import use_comfyui  # noqa: E402

register_snug()

from sparse_files import flux_shapes, sparse_gguf, sparse_safetensors  # noqa: E402


def fastest(action: Callable[[], object], runs: int) -> tuple[float, float]:
    """(seconds, processor seconds)"""
    found = []
    for _ in range(runs):
        clock, processor = time.perf_counter(), time.process_time()
        action()
        found.append((time.perf_counter() - clock, time.process_time() - processor))
    return min(seconds for seconds, _ in found), min(seconds for _, seconds in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI")
    parser.add_argument("--runs", type=int, default=20)
    add_output_arguments(parser)
    options = parser.parse_args()
    command = command_line(comfyui="ComfyUI")  # importing ComfyUI changes the arguments
    use_comfyui(options.comfyui)
    from snug.nodes.adapter.computing import ImageSize
    from snug.nodes.adapter.model_inspector import inspect_file
    from snug.quant_backends.inspection.header import read_header

    size = ImageSize(1024, 1024, 1)
    rows, numbers = [], {}
    with tempfile.TemporaryDirectory() as folder:
        gguf, safetensors = Path(folder) / "flux.gguf", Path(folder) / "flux.safetensors"
        sparse_gguf(gguf, flux_shapes(), "Q8_0")
        sparse_safetensors(safetensors, flux_shapes(), "F8_E4M3")
        for path in (gguf, safetensors):
            contents = read_header(path)
            header = fastest(lambda path=path: read_header(path), options.runs)
            whole = fastest(lambda path=path: inspect_file(str(path), size), options.runs)
            numbers[path.name] = {"header": header, "whole": whole, "header_bytes": contents.header_bytes}
            read = f"{(contents.header_bytes or 0) / 1024:.0f} KB of {contents.file_bytes / 1e9:.1f} GB"
            rows.append([path.name, read, *(f"{value:.3f}" for value in (*header, *whole))])
    facts = {**environment(), "load": f"{psutil.getloadavg()[0]:.1f} in the last minute"}
    columns = ["file", "read", "header, s", "header, processor s", "whole, s", "whole, processor s"]
    text = heading("Inspecting a file by its header", command, facts) + "\n" + table(columns, rows) + "\n"
    print(text)
    save(options, text, {"environment": facts, "files": numbers})


if __name__ == "__main__":
    main()
