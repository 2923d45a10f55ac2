"""Query, key and value of quantized layers: multiplied as one (`fuse_qkv` of Precision (Snug)) against one by one.

    python benchmarks/fused_qkv.py --markdown benchmarks/results/fused-qkv.md --json benchmarks/results/fused-qkv.json

Run it with the Python that ComfyUI runs with, and SNUG_COMFYUI_PATH set (`scripts/bootstrap.py --print-env`).

Three layers of one width with random weights, and a random input. Each round runs both ways in turn, and the median
of the rounds' ratios counts. "node": what the node does, which on a CPU leaves large weights to the layers; "always":
all weights decoded into one matrix. Where the two ways differ by more than rounding the run stops.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle workers must not take the other contender's time

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from snug_path import register_snug
from tiny import use_comfyui


def make_group(fmt: str, width: int, device: torch.device) -> Any:
    """The fused projections of three layers [width, width] in the format called `fmt`."""
    adapter = "snug.nodes.adapter"
    module = {
        name: importlib.import_module(f"{adapter}.{name}")
        for name in ("operations", "packed_module", "loading", "layout", "fused_projections")
    }
    core = importlib.import_module("snug.quant_backends.kernels.dequantize")
    format_called = importlib.import_module("snug.quant_backends.formats.scaled").format_called
    settings = module["packed_module"].LoadSettings(on_weight=module["loading"].ignore)
    operations = module["operations"].build_operations(settings)
    layers = []
    for seed in range(3):
        layer = operations.Linear(width, width, bias=False)
        weight = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
        packed = core.quantize_packed(weight, format_called(fmt))
        packed = module["layout"].pack(packed, torch.float32)
        layer.weight = torch.nn.Parameter(packed.to(device), requires_grad=False)
        layers.append(layer)
    return module["fused_projections"].FusedProjections(layers)


def each(call: Callable[[int, torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    return [call(index, x) for index in range(3)]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    for fmt in options.formats:
        for width in options.widths:
            group = make_group(fmt, width, device)
            for tokens in options.tokens:
                x = torch.randn(1, tokens, width, device=device, dtype=dtype)
                one_by_one, by_node = partial(each, group.alone, x), partial(each, group.forward, x)
                always = partial(group.together, x)
                for found, wanted in zip(by_node(), one_by_one(), strict=True):
                    torch.testing.assert_close(
                        found, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item()
                    )
                rounds = [
                    [seconds(run, device) for run in (one_by_one, by_node, always)]
                    for _ in range(options.rounds)
                ]
                yield {
                    "format": fmt,
                    "width": width,
                    "tokens": tokens,
                    "one_by_one_ms": 1e3 * statistics.median(one for one, _, _ in rounds),
                    "node": statistics.median(one / node for one, node, _ in rounds),
                    "always": statistics.median(one / always for one, _, always in rounds),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["Q8_0", "Q4_0", "float8_e4m3fn-rows"])
    parser.add_argument("--widths", nargs="+", type=int, default=[320, 640, 1280, 3072])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    add_output_arguments(parser)
    options = parser.parse_args()
    command, facts = command_line(), environment()
    use_comfyui(os.environ["SNUG_COMFYUI_PATH"])  # changes the command line
    register_snug()
    torch.set_grad_enabled(False)
    records = list(measure(options))
    header = ["format", "width", "tokens", "one by one ms", "speed-up, node", "speed-up, always"]
    rows = [
        [
            record["format"],
            str(record["width"]),
            str(record["tokens"]),
            f"{record['one_by_one_ms']:.2f}",
            f"{record['node']:.2f}",
            f"{record['always']:.2f}",
        ]
        for record in records
    ]
    text = (
        heading("Query, key and value multiplied as one", command, facts) + "\n" + table(header, rows) + "\n"
    )
    print(text)
    save(options, text, {"command": command, "environment": facts, "tables": records})


if __name__ == "__main__":
    main()
