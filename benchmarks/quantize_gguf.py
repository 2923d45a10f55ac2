"""Quantizing weights to ggml's types on the CPU: Snug beside ggml's own quantizer and the gguf package.

    python benchmarks/quantize_gguf.py --threads 1 2 \
        --markdown benchmarks/results/quantize-gguf.md --json benchmarks/results/quantize-gguf.json

Speed is MB of float32 weights a second, best of the rounds, interleaved; beside the clock's, Snug's and ggml's by
processor time, for machines that do other work meanwhile. libgguf (ggml in native code) and gguf (numpy) use one
thread.
Errors are relative (L2) on Gaussian weights and, "outliers", on such with every 37th column 20 times as large; the ones
with importance count each squared error by it. Types that gguf writes too are compared with its bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle workers must not take the other contenders' time

import gguf
import libgguf
import numpy as np
import torch
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from snug_path import register_snug

register_snug()
from snug.quant_backends.formats import FORMATS, Format  # noqa: E402
from snug.quant_backends.kernels.dequantize import dequantize, quantize  # noqa: E402

TYPES = [fmt for fmt in FORMATS.values() if fmt.can_quantize and fmt.name not in ("F32", "F16")]
EXACT = {fmt.name for fmt in TYPES if not fmt.name.endswith("_K") and not fmt.name.startswith("IQ4")}


def error(found: torch.Tensor, weights: torch.Tensor, importance: torch.Tensor | None) -> float:
    squares, whole = (found - weights).double().square(), weights.double().square()
    if importance is not None:
        squares, whole = squares * importance, whole * importance
    return (squares.sum() / whole.sum()).sqrt().item()


def native(fmt: type[Format], weights: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    numbers = None if importance is None else importance.numpy()
    packed = libgguf.quantize_rows(weights.numpy(), fmt.ggml_type, numbers)
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.uint8))


def errors(fmt: type[Format], rows: int) -> list[tuple[float, float]]:
    """(Snug's, ggml's) for Gaussian weights, outliers, and Gaussian ones with importance."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(rows, 1024, generator=generator) / 50
    outliers = weights.clone()
    outliers[:, ::37] *= 20
    importance = torch.randn(1024, generator=generator).square()
    found = []
    for values, given in ((weights, None), (outliers, None), (weights, importance)):
        ours = dequantize(quantize(values, fmt, given), fmt, values.shape)
        theirs = dequantize(native(fmt, values, given), fmt, values.shape)
        found.append((error(ours, values, given), error(theirs, values, given)))
    return found


def speeds(runs: dict[str, Callable[[], Any]], nbytes: int, rounds: int) -> dict[str, tuple[float, float]]:
    """MB/s by the clock and by processor time."""
    best = dict.fromkeys(runs, (0.0, 0.0))
    for _ in range(rounds):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            best[name] = (
                max(best[name][0], nbytes / wall / 1e6),
                max(best[name][1], nbytes / processor / 1e6),
            )
    return best


def contenders(fmt: type[Format], weights: torch.Tensor) -> dict[str, Callable[[], Any]]:
    array = weights.numpy()
    found: dict[str, Callable[[], Any]] = {"snug": lambda: quantize(weights, fmt)}
    found["libgguf"] = lambda: native(fmt, weights)
    if fmt.name in EXACT:
        found["gguf"] = lambda: gguf.quants.quantize(array, gguf.GGMLQuantizationType[fmt.name])
        if not np.array_equal(quantize(weights, fmt).numpy(), found["gguf"]().view(np.uint8)):
            raise SystemExit(f"{fmt.name}: the bytes differ from gguf's")
    if fmt.name == "BF16":
        del found["libgguf"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--types", nargs="+", choices=[fmt.name for fmt in TYPES], metavar="TYPE", help="these alone"
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="torch's threads")
    parser.add_argument("--rounds", type=int, default=5)
    add_output_arguments(parser)
    arguments = parser.parse_args()
    types = [fmt for fmt in TYPES if arguments.types is None or fmt.name in arguments.types]
    command = command_line()
    facts = environment("numpy", "gguf", "libgguf")
    text = heading("Quantizing weights to ggml's types on the CPU", command, facts)
    print(text)
    weights = torch.randn(arguments.rows, 4096, generator=torch.Generator().manual_seed(0)) / 50
    result: dict[str, Any] = {"command": command, "environment": facts, "speed": {}, "error": {}}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rows = []
        for fmt in types:
            found = speeds(contenders(fmt, weights), weights.nbytes, arguments.rounds)
            result["speed"].setdefault(str(threads), {})[fmt.name] = found
            cells = [f"{found[key][0]:.0f}" if key in found else "–" for key in ("snug", "libgguf", "gguf")]
            processor = [
                f"{found[key][1]:.0f}" if key in found else "–" for key in ("snug", "libgguf", "gguf")
            ]
            ratio = [
                f"{found['snug'][0] / found[key][0]:.1f}" if key in found else "–"
                for key in ("libgguf", "gguf")
            ]
            rows.append([fmt.name, *cells, *ratio, *processor])
        header = ("type", "Snug MB/s", "libgguf", "gguf", "Snug / libgguf", "Snug / gguf")
        header += tuple(f"{name} by processor time" for name in ("Snug", "libgguf", "gguf"))
        part = f"## Speed, threads of torch: {threads}\n\n{table(header, rows)}\n"
        print(part, flush=True)
        text += "\n" + part
    rows = []
    for fmt in types:
        if fmt.name in EXACT:
            continue
        found = errors(fmt, 256)
        result["error"][fmt.name] = found
        rows.append(
            [fmt.name, *(f"{ours:.4f} / {theirs:.4f} = {ours / theirs:.3f}" for ours, theirs in found)]
        )
    header = ("type, Snug / ggml", "Gaussian", "outliers", "Gaussian, importance")
    part = f"## Error\n\n{table(header, rows)}\n"
    print(part)
    save(arguments, text + "\n" + part, result)


if __name__ == "__main__":
    main()
