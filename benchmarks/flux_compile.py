"""How long a compiled Flux takes to be ready, and what has it compiled again: LoRA, strength, image size, residency.

    python benchmarks/flux_compile.py --markdown benchmarks/results/flux-compile-cpu.md \
        --json benchmarks/results/flux-compile-cpu.json

Needs a ComfyUI in $SNUG_COMFYUI_PATH and, on a CPU, a C++ compiler; sizes as in flux_blocks.py. Seconds: of the first
call after each change, the compiler's caches off, beside that of a later call; graphs: how many were compiled in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # a cold start is what is measured

import torch
from flux_lora import make_lora
from flux_model import (
    Size,
    attempt,
    begin,
    caller,
    compiled,
    dense_model,
    free_memory,
    load,
    quantized,
    random_weights,
)
from report import heading, save, table
from timing import synchronize


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def changes(
    patcher: Any, weights: dict[str, torch.Tensor], size: Size
) -> dict[str, Callable[[], tuple[Any, Size]]]:
    """What happens to a model between two calls, in this order: a MODEL to load and the size of the next call."""
    core = importlib.import_module("comfy.sd")
    loras = [make_lora(weights, seed) for seed in range(2)]
    wider = dataclasses.replace(size, pixels=size.pixels + 64)

    def lora(strength: float, *numbers: int) -> Any:
        model = patcher
        for number in numbers:
            model, _ = core.load_lora_for_models(model, None, dict(loras[number]), strength, 0)
        return model

    return {
        "first call": lambda: (patcher, size),
        "a LoRA": lambda: (lora(0.5, 0), size),
        "its strength": lambda: (lora(0.8, 0), size),
        "two LoRAs": lambda: (lora(0.5, 0, 1), size),
        "no LoRA": lambda: (patcher, size),
        "a larger picture": lambda: (patcher, wider),
        "half of the weights on the device": lambda: (patcher, size),
    }


def load_half(patcher: Any) -> None:
    management = importlib.import_module("comfy.model_management")
    patcher.detach()
    loaded = management.LoadedModel(patcher)
    loaded.model_load(patcher.model_size() // 2)


def measure(
    dense: Any, weights: dict[str, torch.Tensor], name: str, size: Size, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A record for each change."""
    torch._dynamo.reset()
    patcher = compiled(dense if name == "dense" else quantized(dense, name))
    for change, make in changes(patcher, weights, size).items():
        model, there = make()
        if change.startswith("half"):
            load_half(model)
        else:
            load(model)
        run, before = caller(model, there), graphs()
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            run()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        yield {
            "format": name,
            "change": change,
            "first": seconds[0],
            "later": min(seconds[1:]),
            "graphs": graphs() - before,
        }
    patcher.detach()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["GGUF Q4_K", "dense"], help="dense, or targets")
    run = begin(parser, "--normalvram")  # with high VRAM, what is offloaded would stay on the GPU
    options, command, device, size, facts = run.options, run.command, run.device, run.size, run.facts
    weights = random_weights(size, device)
    dense = dense_model(weights)
    records: list[dict[str, Any]] = []

    def add(name: str) -> None:
        for record in measure(dense, weights, name, size, device):
            records.append(record)
            print(record, flush=True)
            text = f"{heading('Compiling a Flux', command, facts)}\n{rows(records)}\n"
            save(options, text, {"command": command, "environment": facts, "records": records})

    for name in options.formats:
        attempt(name, lambda name=name: add(name))
        free_memory()
    print(rows(records))


def rows(records: list[dict[str, Any]]) -> str:
    """The table of the records."""
    header = ["format, change", "first call s", "later call s", "graphs compiled"]
    lines = [
        [
            f"{record['format']}, {record['change']}",
            f"{record['first']:.2f}",
            f"{record['later']:.3f}",
            str(record["graphs"]),
        ]
        for record in records
    ]
    return table(header, lines)


if __name__ == "__main__":
    main()
