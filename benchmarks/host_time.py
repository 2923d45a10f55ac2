"""Host time of one linear layer: what Python and torch's dispatcher take before the arithmetic, whatever the size.

    python benchmarks/host_time.py --peer path/to/ComfyUI-GGUF \
        --markdown benchmarks/results/host-time-cpu.md --json benchmarks/results/host-time-cpu.json

Run it with the Python that ComfyUI runs with, and SNUG_COMFYUI_PATH set (`scripts/bootstrap.py --print-env`).

Layers of so few weights that there is next to nothing to calculate (256 x 256, 4 tokens) are called many times; the
time is that of the calling thread, so that neither other processes nor a GPU count. "Whole call" ends when the call
returns: on a CPU that includes the decoding, on a GPU it is handing over. "To the kernel" ends where Snug's kernels
begin (`kernels.linear`): ComfyUI's moving of weights, patches and Snug's own choices. With a LoRA of rank 8 the layer
has it as a branch beside the weight, or merges it into the decoded one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from flux_step import load_peer
from snug_path import register_snug
from tiny import use_comfyui

TITLE = "Host time of one linear layer"
LIMIT = 60  # microseconds to the kernel, at most
SIZE, TOKENS, RANK = 256, 4, 8
CALLS, ROUNDS = 200, 15
FORMATS = ("Q8_0", "Q4_K", "BF16", "bnb-nf4-64", "float8_e4m3fn-tensor", "int8-rows", "quanto-int4-128")
Call = Callable[[], Any]


def dense_layer(kind: type[torch.nn.Module], device: torch.device) -> torch.nn.Module:
    layer = kind(SIZE, SIZE, device=device, dtype=torch.float32)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter.requires_grad_(False))
    return layer


def packed_layer(format: str, device: torch.device, lora: str | None = None) -> torch.nn.Module:
    """One of Snug's layers, as loading makes it. lora: the mode of a LoRA on it, None: there is none."""
    operations = importlib.import_module("snug.nodes.adapter.operations")
    settings = importlib.import_module("snug.nodes.adapter.packed_module").LoadSettings(lambda _: None)
    random_packed = importlib.import_module("random_packed").random_packed
    layout = importlib.import_module("snug.nodes.adapter.layout")
    packed = layout.moved(random_packed(format, (SIZE, SIZE)), device)
    layer = operations.build_operations(settings).Linear(SIZE, SIZE, dtype=torch.float32)
    weights = {"weight": layout.pack(packed, torch.float32), "bias": torch.zeros(SIZE, device=device)}
    layer.load_state_dict(weights)
    if lora is not None:
        patches = importlib.import_module("snug.nodes.adapter.patches")
        settings = importlib.import_module("snug.nodes.adapter.lora_settings")
        branches = importlib.import_module("snug.nodes.adapter.side_branch")
        adapter = importlib.import_module("comfy.weight_adapter").LoRAAdapter
        factors = (torch.randn(SIZE, RANK), torch.randn(RANK, SIZE), float(RANK), None, None, None)
        found = [(0.5, adapter(set(), factors), 1.0, None, None)]
        branch = branches.side_branch(layer, found, device, torch.float32, settings.LoraSettings(lora))
        layer.weight_patches = patches.WeightPatches("weight", found, device, branch)
    return layer


def peer_layer(format: str, device: torch.device, package: Any) -> torch.nn.Module:
    """The peer's layer over the same kind of bytes."""
    ops = importlib.import_module("peer_pack.ops")
    gguf = importlib.import_module("gguf")
    random_packed = importlib.import_module("random_packed").random_packed
    layer = ops.GGMLOps.Linear(SIZE, SIZE, dtype=torch.float32)
    rows = random_packed(format, (SIZE, SIZE)).data.view(SIZE, -1).to(device)
    weight = ops.GGMLTensor(
        rows, tensor_type=gguf.GGMLQuantizationType[format], tensor_shape=torch.Size((SIZE, SIZE))
    )
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(SIZE, device=device)})
    return layer


def microseconds(call: Call) -> float:
    """Of the calling thread, the median of many calls' means."""
    for _ in range(CALLS // 4):
        call()
    times = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        for _ in range(CALLS):
            call()
        times.append((time.thread_time() - started) / CALLS * 1e6)
    return median(times)


def without_kernel(call: Call, output: torch.Tensor) -> float:
    """The same where the kernel is a function that returns at once."""
    layout = importlib.import_module("snug.nodes.adapter.layout")
    with patch.object(layout, "linear", lambda *_: output):
        return microseconds(call)


def measure(device: torch.device, peer: Any) -> list[dict[str, Any]]:
    """One record per layer; `kernel` is None where it is not Snug's, or its weight is decoded whole."""
    core = importlib.import_module("comfy.ops").manual_cast.Linear
    modes = importlib.import_module("snug.nodes.adapter.lora_settings")
    layers = {
        "nn.Linear": (dense_layer(torch.nn.Linear, device), False),
        "ComfyUI's Linear": (dense_layer(core, device), False),
        **{format: (packed_layer(format, device), True) for format in FORMATS},
        "Q8_0, LoRA as a branch": (packed_layer("Q8_0", device, modes.BRANCH), True),
        "Q8_0, LoRA merged": (packed_layer("Q8_0", device, modes.MERGE), False),
    }
    if peer is not None:
        layers |= {
            f"ComfyUI-GGUF {name}": (peer_layer(name, device, peer), False) for name in ("Q8_0", "Q4_K")
        }
    x, output = torch.randn(TOKENS, SIZE, device=device), torch.zeros(TOKENS, SIZE, device=device)
    return [
        {
            "layer": name,
            "whole": microseconds(lambda layer=layer: layer(x)),
            "kernel": without_kernel(lambda layer=layer: layer(x), output) if packed else None,
        }
        for name, (layer, packed) in layers.items()
    ]


def as_markdown(records: list[dict[str, Any]]) -> str:
    dense = records[0]["whole"]
    rows = [
        [
            record["layer"],
            f"{record['whole']:.1f}",
            f"{record['whole'] / dense:.1f}",
            "–" if record["kernel"] is None else f"{record['kernel']:.1f}",
        ]
        for record in records
    ]
    worst = max(record["kernel"] for record in records if record["kernel"] is not None)
    verdict = "kept" if worst <= LIMIT else "exceeded"
    header = ("layer", "whole call µs", "/ nn.Linear", "to the kernel µs")
    sentence = f"The longest way to the kernel takes {worst:.0f} µs; {LIMIT} is the limit: {verdict}."
    return f"{table(header, rows)}\n\n{sentence}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer", type=Path, help="folder of a ComfyUI-GGUF checkout")
    add_output_arguments(parser)
    options = parser.parse_args()
    command = command_line(peer="ComfyUI-GGUF")
    comfyui = os.environ.get("SNUG_COMFYUI_PATH")
    if not comfyui:
        raise SystemExit(
            'SNUG_COMFYUI_PATH is not set: export what "scripts/bootstrap.py --print-env" prints'
        )
    use_comfyui(comfyui)
    register_snug()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
    torch.set_num_threads(1)
    peer = load_peer(options.peer.resolve(), options.peer) if options.peer else None
    facts = environment("comfy-kitchen", "gguf", "libgguf")
    facts["ComfyUI"] = importlib.import_module("comfyui_version").__version__
    with torch.inference_mode():
        records = measure(torch.device(options.device), peer)
    text = heading(TITLE, command, facts) + "\n" + as_markdown(records)
    print(text)
    save(options, text, {"command": command, "environment": facts, "limit": LIMIT, "records": records})


if __name__ == "__main__":
    main()
