"""One step of a Flux, exact and multiplied in 8 bits, with and without copies of the weights in memory, side by side.

    python benchmarks/fast_matmul.py --markdown benchmarks/results/fast-matmul-cpu.md \
        --json benchmarks/results/fast-matmul-cpu.json
    python benchmarks/fast_matmul.py --formats "GGUF Q8_0" "GGUF Q4_K" "bitsandbytes NF4"

Needs a ComfyUI in $SNUG_COMFYUI_PATH; sizes as in flux_blocks.py. All ways take turns in one run; each is a model of
its own. The first call of each, which makes the copies, is not counted. Error: of the result, relative to that of the
same weights multiplied exactly.
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


def ways() -> dict[str, Callable[[Any], Any]]:
    """What is measured: by name, from a MODEL to the one that multiplies in this way."""
    set_fast_matmul = importlib.import_module("snug.nodes.adapter.fast_matmul").set_fast_matmul
    set_spare_memory = importlib.import_module("snug.nodes.adapter.spare_memory_report").set_spare_memory

    def fast(mode: str, keep: bool) -> Callable[[Any], Any]:
        return lambda patcher: set_fast_matmul(patcher, mode, "default", keep)[0]

    return {
        EXACT: lambda patcher: patcher,
        "decoded weights kept": lambda patcher: set_spare_memory(patcher, 0)[0],
        "int8, rounded weights kept": fast("int8", True),
        "int8, rounded in each call": fast("int8", False),
        "int8, rounded or decoded weights kept": lambda patcher: set_spare_memory(
            fast("int8", True)(patcher), 0
        )[0],
        "fp8, rounded weights kept": fast("fp8", True),
    }


def measure(dense: Any, name: str, size: Size, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A record for each way of a format."""
    copies_of = importlib.import_module("snug.nodes.adapter.weight_copies").copies_of
    models = {"dense": dense}
    runs = {"dense": caller(dense, size)}
    results = {"dense": runs["dense"]()}
    for way, make in ways().items():

        def ready(way: str = way, make: Callable[[Any], Any] = make) -> Any:
            patcher = make(quantized(dense, name))
            load(dense, patcher)
            results[way] = caller(patcher, size)()  # makes the copies
            return patcher

        patcher = attempt(f"{name}, {way}", ready)
        if patcher is not None:
            models[way], runs[way] = patcher, caller(patcher, size)
    if EXACT not in models:
        return []
    times = interleaved(runs, rounds, device)
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
        text = f"{heading('Fast matmul and copies of weights', command, facts)}\n{rows(records)}\n"
        save(options, text, {"command": command, "environment": facts, "records": records})
    print(text)


def rows(records: list[dict[str, Any]]) -> str:
    """The table of the records."""
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
    return table(header, lines)


if __name__ == "__main__":
    main()
