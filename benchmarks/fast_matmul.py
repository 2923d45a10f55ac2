"""One step of a Flux, exact and multiplied in 8 bits, with and without copies of the weights in memory, side by side.

    python benchmarks/fast_matmul.py --markdown benchmarks/results/fast-matmul-cpu.md \
        --json benchmarks/results/fast-matmul-cpu.json
    python benchmarks/fast_matmul.py --formats "GGUF Q8_0" "GGUF Q4_K" "bitsandbytes NF4"

Needs a ComfyUI in $SNUG_COMFYUI_PATH; sizes as in flux_blocks.py. All ways take turns in one run; each is a model of
its own. The first call of each, which makes the copies, is not counted. Error: of the result, relative to that of the
same weights multiplied exactly.

A second table is of one weight alone: the time to round it to 8 bits, by the GPU's kernel and by torch, beside that to
decode it as the exact way does. On a CPU torch does all of it.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
from flux_model import (
    Size,
    attempt,
    begin,
    caller,
    dense_model,
    free_memory,
    load,
    quantized,
    random_weights,
)
from report import heading, save, table
from timing import interleaved

EXACT = "exact"
# Only where there is a kernel to compare with.
BY_TORCH = "int8, rounded in each call by torch"


def by_torch(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same with weights rounded by torch."""
    module: Any = importlib.import_module("snug.quant_backends.kernels.rounding")

    def call() -> Any:
        kernel, module.round_weight_by_kernel = module.round_weight_by_kernel, lambda *_: None
        try:
            return run()
        finally:
            module.round_weight_by_kernel = kernel

    return call


def ways(device: torch.device) -> dict[str, Callable[[Any], Any]]:
    """What is measured: by name, from a MODEL to the one that multiplies in this way."""
    set_fast_matmul = importlib.import_module("snug.nodes.adapter.fast_matmul").set_fast_matmul
    set_spare_memory = importlib.import_module("snug.nodes.adapter.spare_memory_report").set_spare_memory

    def fast(mode: str, keep: bool) -> Callable[[Any], Any]:
        return lambda patcher: set_fast_matmul(patcher, mode, "default", keep)[0]

    found = {
        EXACT: lambda patcher: patcher,
        "decoded weights kept": lambda patcher: set_spare_memory(patcher, 0)[0],
        "int8, rounded weights kept": fast("int8", True),
        "int8, rounded in each call": fast("int8", False),
        "int8, rounded or decoded weights kept": lambda patcher: set_spare_memory(
            fast("int8", True)(patcher), 0
        )[0],
        "fp8, rounded weights kept": fast("fp8", True),
    }
    return found | ({BY_TORCH: fast("int8", False)} if device.type == "cuda" else {})


def measure_weight(patcher: Any, device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds that the weight of one of the model's largest layers takes."""
    fast_matmul = importlib.import_module("snug.quant_backends.kernels.fast_matmul")
    dequantize = importlib.import_module("snug.quant_backends.kernels.dequantize").dequantize_packed
    layer = patcher.model.diffusion_model.single_blocks[0].linear2
    packed = importlib.import_module("snug.nodes.adapter.layout").packed_tensor(layer.weight)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def rounding(stored: str) -> Callable[[], Any]:
        return lambda: fast_matmul.round_weight(packed, stored, dtype)

    runs = {"decoded": lambda: dequantize(packed, dtype)}
    for stored in (fast_matmul.INT8, fast_matmul.FLOAT8):
        if fast_matmul.rounds_in_one_pass(packed, device):
            runs[f"{stored} by the kernel"] = rounding(stored)
        runs[f"{stored} by torch"] = by_torch(rounding(stored))
    with torch.inference_mode():
        times = interleaved(runs, rounds, device, warm_up=2)
    return {way: times[way].seconds() for way in runs}


def measure(dense: Any, name: str, size: Size, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A record for each way of a format, with what `measure_weight` found in that of the exact one."""
    copies_of = importlib.import_module("snug.nodes.adapter.weight_copies").copies_of
    models = {"dense": dense}
    runs = {"dense": caller(dense, size)}
    results = {"dense": runs["dense"]()}
    for way, make in ways(device).items():

        def ready(way: str = way, make: Callable[[Any], Any] = make) -> Any:
            patcher = make(quantized(dense, name))
            load(dense, patcher)
            results[way] = caller(patcher, size)()  # makes the copies
            return patcher

        patcher = attempt(f"{name}, {way}", ready)
        if patcher is not None:
            run = caller(patcher, size)
            models[way], runs[way] = patcher, by_torch(run) if way == BY_TORCH else run
    if EXACT not in models:
        return []
    times = interleaved(runs, rounds, device)
    one_weight = measure_weight(models[EXACT], device, rounds)
    exact, records = results[EXACT], []
    for way, patcher in models.items():
        copies = copies_of(patcher.model)
        records.append(
            {
                "format": name,
                "way": way,
                "seconds": times[way].seconds(),
                "dense_ratio": times[way].seconds() / times["dense"].seconds(),
                "exact_ratio": times[way].seconds() / times[EXACT].seconds(),
                "error": float((results[way] - exact).float().norm() / exact.float().norm()),
                "weight_bytes": patcher.model_size(),
                "copy_bytes": 0 if copies is None else copies.nbytes,
            }
        )
        if way == EXACT:
            records[-1]["one_weight"] = one_weight
        if way != "dense":
            patcher.detach()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["GGUF Q8_0", "GGUF Q4_K"], help="targets")
    run = begin(parser)
    options, command, device, size, facts = run.options, run.command, run.device, run.size, run.facts
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts["threads"] = str(torch.get_num_threads())
    dense = dense_model(random_weights(size, device))
    load(dense)
    records: list[dict[str, Any]] = []
    text = ""
    for name in options.formats:
        records += attempt(name, lambda name=name: measure(dense, name, size, device, options.rounds)) or []
        free_memory()
        text = f"{heading('Fast matmul and copies of weights', command, facts)}\n{tables(records)}\n"
        save(options, text, {"command": command, "environment": facts, "records": records})
    print(text)


def tables(records: list[dict[str, Any]]) -> str:
    """Of the ways, and of one weight."""
    header = ["format, way", "step ms", "/ dense", "/ exact", "error", "weights MB", "copies MB"]
    lines = [
        [
            f"{record['format']}, {record['way']}",
            f"{record['seconds'] * 1e3:.1f}",
            f"{record['dense_ratio']:.2f}",
            f"{record['exact_ratio']:.2f}",
            f"{record['error']:.2%}",
            f"{record['weight_bytes'] / 1e6:.0f}",
            f"{record['copy_bytes'] / 1e6:.0f}",
        ]
        for record in records
    ]
    found = {record["format"]: record["one_weight"] for record in records if "one_weight" in record}
    if not found:
        return table(header, lines)
    header_of_one = ["format", *next(iter(found.values()))]
    of_one = [
        [name, *(f"{seconds * 1e3:.3f}" for seconds in times.values())] for name, times in found.items()
    ]
    note = "Milliseconds to decode the weight of one of the largest layers, and to round it to 8 bits:"
    return "\n\n".join([table(header, lines), note, table(header_of_one, of_one)])


if __name__ == "__main__":
    main()
