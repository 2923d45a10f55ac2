"""Linear layers that multiply in 8 bits, against the same weight decoded and multiplied in float32, and a dense one.

    python benchmarks/eight_bit_products.py --markdown benchmarks/results/eight-bit-products-cpu.md \\
        --json benchmarks/results/eight-bit-products-cpu.json

One layer [width, width] with random weights and some rows of random input. Each round runs all ways in turn; a ratio is
the median over the rounds of its time to that of the dense layer in the same round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle workers must not take the other contender's time

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from snug_path import register_snug

register_snug()
quantization = "snug.quant_backends.quantization"
encode_calibrated = import_module(f"{quantization}.activations").encode_calibrated
Recorder = import_module(f"{quantization}.recording").Recorder
scaled_format = import_module("snug.quant_backends.formats.scaled").scaled_format
quantize_packed = import_module("snug.quant_backends.kernels.dequantize").quantize_packed
linear = import_module("snug.quant_backends.kernels.linear").linear


def ways(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """What is timed, by name; the dense layer first."""
    network = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], 1, device=x.device))
    with Recorder(network) as recorder:
        network(x)
    statistics_of = recorder.calibration().layers["0"]
    packed = {"int8 by row, decoded": quantize_packed(weight, scaled_format("int8-rows"))}
    for stored in ("int8", "float8_e4m3fn"):
        packed[f"{stored} dynamic"] = quantize_packed(weight, scaled_format(f"product-{stored}-dynamic"))
        packed[f"{stored} static"] = encode_calibrated(
            weight, scaled_format(f"product-{stored}-static"), statistics_of
        )
    runs = {name: lambda found=found: linear(x, found) for name, found in packed.items()}
    return {"dense": lambda: torch.nn.functional.linear(x, weight), **runs}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    add_output_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    weight = torch.randn(options.width, options.width, device=device).to(dtype) / options.width**0.5
    results = []
    for rows in options.rows:
        x = torch.randn(rows, options.width, device=device).to(dtype)
        runs = ways(weight, x)
        exact = runs["dense"]().float()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(options.rounds + 1):
            for name, run in runs.items():
                taken = seconds(run, device)
                if number:  # the first is to warm up
                    times[name].append(taken)
        for name, run in runs.items():
            ratios = [own / dense for own, dense in zip(times[name], times["dense"], strict=True)]
            error = torch.linalg.vector_norm(run().float() - exact) / torch.linalg.vector_norm(exact)
            found = {"milliseconds": 1e3 * statistics.median(times[name]), "ratio": statistics.median(ratios)}
            results.append({"rows": rows, "way": name, **found, "error": error.item()})
    cells = [
        (str(r["rows"]), r["way"], f"{r['milliseconds']:.1f}", f"{r['ratio']:.2f}", f"{r['error']:.4f}")
        for r in results
    ]
    facts = {
        "layer": f"{options.width} x {options.width}, {dtype}, {options.threads} threads",
        **environment(),
    }
    text = heading("Linear layers that multiply in 8 bits", command_line(), facts)
    text += "\n" + table(("rows", "way", "ms", "time / dense", "error"), cells) + "\n"
    print(text)
    save(options, text, {"environment": facts, "results": results})


if __name__ == "__main__":
    main()
