"""A Flux whose weights do not fit: steps with less and less GPU memory, beside the slower of computing and copying.

    python benchmarks/flux_offload.py --double 19 --single 38 --markdown benchmarks/results/flux-offload-cuda.md \
        --json benchmarks/results/flux-offload-cuda.json

Needs a ComfyUI in $SNUG_COMFYUI_PATH. On a CPU nothing is streamed, so that --device cpu only shows that all of it
runs; benchmarks/offload_plan.py shows the plans on a simulated device. The link is measured in the same run (pinned
memory to the device; on a CPU, a copy in memory). Computing: a step with all weights on the device, same format, same
run. For each share of the blocks that may stay: a step streamed by Group Offload (Snug), and one offloaded by ComfyUI
in as much memory, as ratios to max(computing, bytes copied / link), which cannot be below 1.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from functools import partial
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

SHARES = (0.75, 0.5, 0.25, 0.0)


def link_speed(device: torch.device) -> float:
    """Bytes per second from pinned memory, the best of ten copies."""
    cuda = device.type == "cuda"
    host = torch.empty(512 << 20 if cuda else 16 << 20, dtype=torch.uint8, pin_memory=cuda)
    there = torch.empty_like(host, device=device)
    times = interleaved({"copy": partial(there.copy_, host, non_blocking=True)}, 10, device)["copy"]
    return host.nbytes / min(times.device["whole"])


def block_bytes(patcher: Any) -> int:
    units = importlib.import_module("snug.nodes.adapter.offload_units")
    return sum(unit.block.nbytes for unit in units.offload_units(patcher.model, units.BLOCK))


def seconds(patcher: Any, size: Size, device: torch.device, rounds: int) -> float:
    times = interleaved({"step": caller(patcher, size)}, rounds, device, warm_up=2)["step"]
    return times.seconds()


def streamed_by_snug(patcher: Any, share: float) -> tuple[Any, Any]:
    """(MODEL, its plan) with so much of the blocks on the device, beside the slots that the others go through.

    Raises SnugError where the slots alone take more.
    """
    offload = importlib.import_module("snug.nodes.adapter.group_offload")
    settings = importlib.import_module("snug.nodes.adapter.offloading").OffloadSettings
    limit = patcher.model_size() - int((1 - share) * block_bytes(patcher)) if share else None
    streamed = offload.offload_model(patcher, settings(limit=limit))[0]
    offloading = streamed.offloading
    return streamed, offloading.plan(streamed.model, offloading.units(streamed.model))


def offloaded_by_comfyui(patcher: Any, nbytes: int) -> None:
    """Loads as ComfyUI does when its estimate leaves `nbytes` for the weights."""
    management = importlib.import_module("comfy.model_management")
    management.LoadedModel(patcher).model_load(nbytes)


def measure(
    dense: Any, name: str, size: Size, device: torch.device, link: float, rounds: int
) -> Iterator[dict[str, Any]]:
    """A record for each share."""
    errors = importlib.import_module("snug.quant_backends.core.errors")
    patcher = dense if name == "dense" else quantized(dense, name)
    load(patcher)
    computing = seconds(patcher, size, device, rounds)
    patcher.detach()
    total = patcher.model_size()
    for share in SHARES:
        try:
            streaming, plan = streamed_by_snug(patcher, share)
        except errors.SnugError as error:
            print(f"left out: {name}, {share:.0%}: {error}", file=sys.stderr)
            continue
        # The same memory for both; whoever keeps slots in it has to copy more.
        allowed = total - block_bytes(patcher) + plan.device_bytes
        copied = {"snug": plan.step_bytes, "comfyui": total - allowed}
        load_streamed(streaming)
        found = {"snug": seconds(streaming, size, device, rounds)}
        streaming.detach()
        offloaded_by_comfyui(patcher, allowed)
        found["comfyui"] = seconds(patcher, size, device, rounds)
        patcher.detach()
        yield {
            "format": name,
            "share": share,
            "allowed_bytes": allowed,
            "computing": computing,
            "copying": copied["snug"] / link,
            **found,
            **{f"{who}_ratio": found[who] / max(computing, copied[who] / link) for who in found},
            "plan": plan.report(),
        }
        del streaming
        free_memory()


def load_streamed(patcher: Any) -> None:
    importlib.import_module("comfy.model_management").load_models_gpu([patcher])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["GGUF Q8_0", "dense", "GGUF Q4_K"])
    run = begin(parser, "--normalvram")  # with high VRAM, what is offloaded would stay on the GPU
    options, command, device, size = run.options, run.command, run.device, run.size
    if options.device == "auto" and not torch.cuda.is_available():
        raise SystemExit(
            "No CUDA device: nothing is copied on a CPU. benchmarks/offload_plan.py simulates a device; --device cpu "
            "shows that this script runs."
        )
    link = link_speed(device)
    facts = {**run.facts, "link": f"{link / 1e9:.1f} GB/s"}
    dense = dense_model(random_weights(size, device))
    records: list[dict[str, Any]] = []

    def add(name: str) -> None:
        for record in measure(dense, name, size, device, link, options.rounds):
            records.append(record)
            print({key: value for key, value in record.items() if key != "plan"}, flush=True)
            text = f"{heading('An offloaded Flux', command, facts)}\n{rows(records)}\n"
            save(options, text, {"command": command, "environment": facts, "records": records})

    for name in options.formats:
        attempt(name, lambda name=name: add(name))
        free_memory()
    print(rows(records))


def rows(records: list[dict[str, Any]]) -> str:
    """The table of the records."""
    header = ["format, share that stays", "computing ms", "copying ms", "Snug ms", "ComfyUI ms"]
    header += ["Snug / max", "ComfyUI / max"]
    lines = [
        [
            f"{record['format']}, {record['share']:.0%}",
            *(f"{record[part] * 1e3:.0f}" for part in ("computing", "copying", "snug", "comfyui")),
            f"{record['snug_ratio']:.3f}",
            f"{record['comfyui_ratio']:.3f}",
        ]
        for record in records
    ]
    return table(header, lines)


if __name__ == "__main__":
    main()
