"""What LoRAs cost in one step of a Flux: none, one and four of rank 32 on every layer of the blocks, side by side.

    python benchmarks/flux_lora.py --markdown benchmarks/results/flux-lora-cpu.md \
        --json benchmarks/results/flux-lora-cpu.json

Needs a ComfyUI in $SNUG_COMFYUI_PATH; sizes as in flux_blocks.py. Each number of LoRAs is a model of its own, so that
all take turns in one run. Ways: those of LoRA Mode (Snug). The dense model has its LoRAs merged by ComfyUI before the
first step, which costs nothing afterwards.
"""

from __future__ import annotations

import argparse
import importlib
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

RANK = 32
COUNTS = (0, 1, 4)
WAYS = ("automatic", "merge")


def make_lora(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """A LoRA for every matrix of the blocks, a tenth as large as its weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        if weight.dim() != 2 or "_blocks." not in name:
            continue
        rows, columns = weight.shape
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        down = torch.randn(RANK, columns, generator=generator) / columns**0.5
        tensors[f"{layer}.lora_A.weight"] = down.bfloat16()
        up = torch.randn(rows, RANK, generator=generator) * 0.1 / RANK**0.5
        tensors[f"{layer}.lora_B.weight"] = up.bfloat16()
    return tensors


def with_loras(patcher: Any, loras: list[dict[str, torch.Tensor]]) -> Any:
    core = importlib.import_module("comfy.sd")
    for lora in loras:
        patcher, _ = core.load_lora_for_models(patcher, None, dict(lora), 0.5, 0)
    return patcher


def measure(
    dense: Any,
    loras: list[dict[str, torch.Tensor]],
    name: str,
    way: str,
    size: Size,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """The record of a format and a way: seconds of a step by the number of LoRAs."""
    modes = importlib.import_module("snug.nodes.adapter.lora_mode")
    models = {
        count: with_loras(modes.set_lora_mode(quantized(dense, name), way, True)[0], loras[:count])
        for count in COUNTS
    }
    load(*models.values())
    runs = {str(count): caller(patcher, size) for count, patcher in models.items()}
    times = interleaved(runs, rounds, device)
    for patcher in models.values():
        patcher.detach()
    return {"format": name, "way": way, "seconds": {count: times[count].seconds() for count in runs}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["GGUF Q8_0", "GGUF Q4_K"], help="targets")
    run = begin(parser)
    options, command, device, size, facts = run.options, run.command, run.device, run.size, run.facts
    weights = random_weights(size, device)
    loras = [make_lora(weights, seed) for seed in range(max(COUNTS))]
    dense, records = dense_model(weights), []
    text = ""
    for name in options.formats:
        for way in WAYS:
            record = attempt(
                f"{name}, {way}",
                lambda name=name, way=way: measure(dense, loras, name, way, size, device, options.rounds),
            )
            free_memory()
            if record is not None:
                records.append(record)
                print(record, flush=True)
                text = f"{heading(f'LoRAs of rank {RANK} on a Flux', command, facts)}\n{rows(records)}\n"
                save(options, text, {"command": command, "environment": facts, "records": records})
    print(text)


def rows(records: list[dict[str, Any]]) -> str:
    """The table of the records."""
    header = ["format, way", *(f"{count} LoRAs, ms" for count in COUNTS)]
    header += [f"{count} / none" for count in COUNTS[1:]]
    lines = []
    for record in records:
        none, *others = record["seconds"].values()
        lines.append(
            [
                f"{record['format']}, {record['way']}",
                *(f"{value * 1e3:.1f}" for value in (none, *others)),
                *(f"{value / none:.3f}" for value in others),
            ]
        )
    return table(header, lines)


if __name__ == "__main__":
    main()
