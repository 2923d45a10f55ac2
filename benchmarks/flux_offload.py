"""A Flux whose weights do not fit: steps with less and less GPU memory, beside the slower of computing and copying.

    python benchmarks/flux_offload.py --double 19 --single 38 --markdown benchmarks/results/flux-offload-cuda.md \
        --json benchmarks/results/flux-offload-cuda.json

Needs a CUDA device and a ComfyUI in $SNUG_COMFYUI_PATH; on other machines benchmarks/offload_plan.py shows the same
plans on a simulated one. The link is measured in the same run (pinned memory to the device). Computing: a step with all
weights on the device, same format, same run. For each share of the weights that may stay: a step streamed by Group
Offload (Snug) and one offloaded by ComfyUI, as ratios to max(computing, bytes / link), which cannot be below 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib
from functools import partial
from typing import Any

import torch
from flux_model import (
    Size,
    add_size_arguments,
    caller,
    comfyui_version,
    dense_model,
    load,
    quantized,
    random_weights,
    start,
)
from report import add_output_arguments, command_line, environment, heading, save, table
from timing import interleaved

SHARES = (0.75, 0.5, 0.25, 0.0)


def link_speed(device: torch.device) -> float:
    """Bytes per second from pinned memory, the best of ten copies of 512 MiB."""
    host = torch.empty(512 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    times = interleaved({"copy": partial(there.copy_, host, non_blocking=True)}, 10, device)["copy"]
    return host.nbytes / min(times.device["whole"])


def block_bytes(patcher: Any) -> int:
    units = importlib.import_module("snug.nodes.adapter.offload_units")
    return sum(unit.block.nbytes for unit in units.offload_units(patcher.model, units.BLOCK))


def seconds(patcher: Any, size: Size, device: torch.device, rounds: int) -> float:
    times = interleaved({"step": caller(patcher, size)}, rounds, device, warm_up=2)["step"]
    return times.seconds()


def offloaded_by_comfyui(patcher: Any, nbytes: int) -> None:
    """Loads as ComfyUI does when its estimate leaves `nbytes` for the weights."""
    management = importlib.import_module("comfy.model_management")
    management.LoadedModel(patcher).model_load(nbytes)


def measure(
    dense: Any, name: str, size: Size, device: torch.device, link: float, rounds: int
) -> list[dict[str, Any]]:
    offload = importlib.import_module("snug.nodes.adapter.group_offload")
    settings = importlib.import_module("snug.nodes.adapter.offloading").OffloadSettings
    patcher = dense if name == "dense" else quantized(dense, name)
    load(patcher)
    computing = seconds(patcher, size, device, rounds)
    patcher.detach()
    total, streamed, records = patcher.model_size(), block_bytes(patcher), []
    for share in SHARES:
        copied = int((1 - share) * streamed)
        floor = max(computing, copied / link)
        limit = total - copied
        streaming, report = offload.offload_model(patcher, settings(limit=limit if share else None))
        load_streamed(streaming)
        ours = seconds(streaming, size, device, rounds)
        streaming.detach()
        offloaded_by_comfyui(patcher, limit)
        theirs = seconds(patcher, size, device, rounds)
        patcher.detach()
        records.append(
            {
                "format": name,
                "share": share,
                "computing": computing,
                "copying": copied / link,
                "snug": ours,
                "comfyui": theirs,
                "snug_ratio": ours / floor,
                "comfyui_ratio": theirs / floor,
                "plan": report,
            }
        )
        print({key: value for key, value in records[-1].items() if key != "plan"}, flush=True)
        gc.collect()
    return records


def load_streamed(patcher: Any) -> None:
    importlib.import_module("comfy.model_management").load_models_gpu([patcher])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_size_arguments(parser)
    parser.add_argument("--formats", nargs="+", default=["dense", "GGUF Q8_0", "GGUF Q4_K"])
    add_output_arguments(parser)
    options = parser.parse_args()
    command = command_line(comfyui=None)
    if options.device == "cpu" or not torch.cuda.is_available():
        raise SystemExit(
            "No CUDA device: nothing is copied on a CPU. benchmarks/offload_plan.py simulates a device."
        )
    device, size = start(options)
    link = link_speed(device)
    facts = {
        **environment("comfy-kitchen"),
        "ComfyUI": comfyui_version(),
        "model": str(size),
        "link": f"{link / 1e9:.1f} GB/s",
    }
    dense = dense_model(random_weights(size, device))
    records = [
        record
        for name in options.formats
        for record in measure(dense, name, size, device, link, options.rounds)
    ]
    header = ["format, share that stays", "computing ms", "copying ms", "Snug ms", "ComfyUI ms"]
    header += ["Snug / max", "ComfyUI / max"]
    rows = [
        [
            f"{record['format']}, {record['share']:.0%}",
            *(f"{record[part] * 1e3:.0f}" for part in ("computing", "copying", "snug", "comfyui")),
            f"{record['snug_ratio']:.3f}",
            f"{record['comfyui_ratio']:.3f}",
        ]
        for record in records
    ]
    text = f"{heading('An offloaded Flux', command, facts)}\n{table(header, rows)}\n"
    print(text)
    save(options, text, {"command": command, "environment": facts, "records": records})


if __name__ == "__main__":
    main()
