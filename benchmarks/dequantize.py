"""Decoding packed weights on the CPU: Snug beside the libraries of each format and, if given, another node pack.

    python benchmarks/dequantize.py --cols 3072 12288 --threads 1 2 --peer path/to/ComfyUI-GGUF/dequant.py \
        --kinds ggml --markdown benchmarks/results/dequantize-cpu.md --json benchmarks/results/dequantize-cpu.json
    python benchmarks/dequantize.py --kinds scaled --rounds 15 --threads 1 2 --statistic best

Each round runs every contender once on the same random bytes, in turn, and the median over the rounds counts, or the
best one (--statistic best, for machines that do other work meanwhile). --clock processor counts the time that all
threads of the process compute, which other processes hardly change; it does not say how well threads share the work.
Snug decodes with torch alone, and a second time with the package libgguf for the types where it uses it.
Every contender allocates its result; numpy's float32 result is converted with torch where another dtype is wanted.
The peer decodes in float32 as Snug does (its own default, the stored float16, is not exact); types that it would
hand to the gguf package are left out. The results are compared before anything is timed.

Scaled formats are decoded by the library that writes them as well, through `quant_backends`, from the same tensors
(random codes, scales in the type of the result, bitsandbytes' in float32).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle workers must not take the other contenders' time

import gguf
import numpy as np
import torch
from report import add_output_arguments, command_line, environment, heading, save, table

for folder in ("scripts", "tests/support"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
from snug_path import register_snug  # noqa: E402

register_snug()
from random_packed import random_packed  # noqa: E402
from snug.quant_backends.core.backend import Backend  # noqa: E402
from snug.quant_backends.formats import FORMATS, Format  # noqa: E402
from snug.quant_backends.formats.scaled import scaled_format  # noqa: E402
from snug.quant_backends.kernels import native  # noqa: E402
from snug.quant_backends.kernels.dequantize import dequantize, dequantize_packed  # noqa: E402
from snug.quant_backends.registry import BACKENDS  # noqa: E402

Contenders = dict[str, Callable[[], torch.Tensor]]


def load_peer(path: str) -> ModuleType:
    """The `dequant.py` of a ComfyUI-GGUF checkout, as a module of its own."""
    spec = importlib.util.spec_from_file_location("peer_dequant", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file; give the path of the peer's dequant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contenders(
    fmt: type[Format], shape: tuple[int, int], dtype: torch.dtype, peer: ModuleType | None
) -> Contenders:
    """What decodes random bytes of one format; Snug last, with torch alone."""
    row_bytes = fmt.nbytes(shape[1:])
    raw = np.random.default_rng(0).integers(0, 256, (shape[0], row_bytes), dtype=np.uint8)
    packed = torch.from_numpy(raw)
    ggml_type = gguf.GGMLQuantizationType[fmt.name]
    found: Contenders = {}
    if fmt.name != "Q1_0":  # the gguf package does not decode it
        found["numpy"] = lambda: torch.from_numpy(gguf.quants.dequantize(raw, ggml_type)).to(dtype)
    if peer is not None and ggml_type in peer.dequantize_functions:
        decode = peer.dequantize
        found["peer"] = lambda: decode(packed, ggml_type, shape, dtype=torch.float32).to(dtype)
    if native.native_decoder(fmt, packed) is not None:
        found["native"] = lambda: dequantize(packed, fmt, shape, dtype)

    def with_torch() -> torch.Tensor:
        with native.torch_only():
            return dequantize(packed, fmt, shape, dtype)

    found["snug"] = with_torch
    return found


def scaled_formats() -> list[tuple[type[Backend], str]]:
    """Every scaled format in the registry with each library that decodes it."""
    found = [
        (backend, name)
        for backend in BACKENDS.values()
        for family in backend.families
        for name in family.examples
        if name not in FORMATS
    ]
    return [(backend, name) for backend, name in found if backend.handles(scaled_format(name))]


def scaled_contenders(
    backend: type[Backend], name: str, shape: tuple[int, int], dtype: torch.dtype
) -> Contenders:
    """What decodes random codes of one scaled format; Snug last."""
    packed = random_packed(name, shape, torch.float32 if backend.name == "bitsandbytes" else dtype)
    return {
        "library": lambda: backend.dequantize(packed, dtype),
        "snug": lambda: dequantize_packed(packed, dtype),
    }


def check(runs: Contenders, steps: int = 0) -> None:
    """Raise unless all results are the same (a NaN equals a NaN), up to `steps` units in the last place."""
    results = [run().nan_to_num() for run in runs.values()]
    for name, result in zip(runs, results, strict=True):
        limits = torch.finfo(result.dtype)
        if not torch.allclose(result, results[-1], rtol=steps * limits.eps, atol=steps * limits.tiny):
            raise SystemExit(f"{name} differs from Snug: the table would compare different things")


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {"median": statistics.median, "best": min}


def milliseconds(runs: Contenders, arguments: argparse.Namespace) -> dict[str, float]:
    """The time of each contender over the rounds, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    clock = CLOCKS[arguments.clock]
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append((clock() - started) * 1e3)
    return {name: STATISTICS[arguments.statistic](values) for name, values in times.items()}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per table: its settings and the times of every format."""
    peer = load_peer(arguments.peer) if arguments.peer else None
    formats = [fmt for fmt in FORMATS.values() if fmt.dtype is None or fmt.name == "BF16"]
    formats = [fmt for fmt in formats if not arguments.types or fmt.name in arguments.types]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for columns in arguments.cols:
            for name in arguments.dtype:
                shape, dtype = (arguments.rows, columns), getattr(torch, name)
                times = {}
                for fmt in formats if "ggml" in arguments.kinds else ():
                    runs = contenders(fmt, shape, dtype, peer)
                    check(runs)
                    times[fmt.name] = milliseconds(runs, arguments)
                scaled = {}
                for backend, scaled_name in scaled_formats() if "scaled" in arguments.kinds else ():
                    runs = scaled_contenders(backend, scaled_name, shape, dtype)
                    check(runs, steps=2)
                    scaled[f"{scaled_name} / {backend.package}"] = milliseconds(runs, arguments)
                yield {
                    "threads": threads,
                    "shape": shape,
                    "dtype": name,
                    "milliseconds": times,
                    "scaled": scaled,
                }


def record_tables(record: dict[str, Any]) -> str:
    """One record in Markdown: a row per format, ggml's and scaled ones apart."""
    rows, columns = record["shape"]
    title = f"### {rows} x {columns} to {record['dtype']}, threads: {record['threads']}"
    weights = rows * columns / 1e6
    parts = [title]
    if record["milliseconds"]:
        header = (
            "type",
            "gguf numpy ms",
            "peer ms",
            "Snug with libgguf ms",
            "Snug ms",
            "Snug G weights/s",
            "numpy / Snug",
            "peer / Snug",
            "with libgguf / Snug",
        )
        parts.append(_table(header, record["milliseconds"], ("numpy", "peer", "native"), weights))
    if record["scaled"]:
        header = ("format / library", "library ms", "Snug ms", "Snug G weights/s", "library / Snug")
        parts.append(_table(header, record["scaled"], ("library",), weights))
    return "\n\n".join(parts)


def _table(
    header: Sequence[str], times: dict[str, dict[str, float]], others: Sequence[str], weights: float
) -> str:
    """weights: millions in each matrix."""
    lines = []
    for name, found in times.items():
        snug = found["snug"]
        cells = [f"{found[key]:.1f}" if key in found else "–" for key in others]
        ratios = [f"{found[key] / snug:.2g}" if key in found else "–" for key in others]
        lines.append([name, *cells, f"{snug:.1f}", f"{weights / snug:.2f}", *ratios])
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--cols", type=int, nargs="+", default=[3072], help="multiples of 256")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "float16", "bfloat16"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="torch's threads; numpy uses one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--statistic", default="median", choices=STATISTICS, help="of the rounds")
    parser.add_argument(
        "--types", nargs="+", default=[], choices=FORMATS, metavar="TYPE", help="default: all"
    )
    parser.add_argument(
        "--kinds", nargs="+", default=["ggml", "scaled"], choices=["ggml", "scaled"], help="default: both"
    )
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--peer", help="dequant.py of a ComfyUI-GGUF checkout")
    add_output_arguments(parser)
    arguments = parser.parse_args()

    command = command_line(peer="ComfyUI-GGUF/dequant.py")
    facts = environment("numpy", "gguf", native.PACKAGE, "bitsandbytes", "torchao", "optimum-quanto")
    text = heading("Decoding packed weights on the CPU", command, facts)
    print(text)
    records = []
    with np.errstate(all="ignore"):  # random bytes hold infinite scales
        for record in measure(arguments):
            records.append(record)
            print(record_tables(record) + "\n", flush=True)
            text += "\n" + record_tables(record) + "\n"
    save(arguments, text, {"command": command, "environment": facts, "tables": records})


if __name__ == "__main__":
    main()
