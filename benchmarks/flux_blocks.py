"""One step of a Flux, eager and compiled: dense, in Snug's formats, and with other libraries' layers, side by side.

    python benchmarks/flux_blocks.py --markdown benchmarks/results/flux-blocks-cpu.md \
        --json benchmarks/results/flux-blocks-cpu.json
    python benchmarks/flux_blocks.py --double 19 --single 38 --peers --formats "GGUF Q8_0" "GGUF Q4_K"

Needs a ComfyUI in $SNUG_COMFYUI_PATH. On a GPU the layers are Flux.1-dev's, in bfloat16, for a picture of 1024 x 1024;
on a CPU they are narrower, in float32 as ComfyUI computes there. All contenders of a mode take turns in one run, and
ratios are to the dense model of the same mode. A step of the whole model is put together from one double and one single
block (19 and 38 of them); with as many blocks as the real model has, the column "call" is one. Host: the time until
Python has handed all work to the device. Error: of the result, relative to the dense model's. Peers use their own layer
inside the same blocks, where the library is installed and runs on the device; --peer-pack measures a checkout of
ComfyUI-GGUF by its own loader, too.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flux_model import (
    Size,
    begin,
    blocks,
    caller,
    compiled,
    dense_model,
    load,
    quantized,
    random_weights,
    step_of_full_model,
)
from flux_peers import peer, peer_names
from report import heading, save, table
from timing import Times, interleaved, peak_growth

DENSE = "dense"
FORMATS = {
    "cuda": [
        f"GGUF {name}" for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "IQ4_XS", "MXFP4")
    ]
    + ["bitsandbytes NF4", "FP8 e4m3fn per row", "INT8 per row", "torchao int8", "quanto int4"]
    + ["INT8 dynamic", "FP8 dynamic"],
    "cpu": ["GGUF Q8_0", "GGUF Q4_K", "bitsandbytes NF4", "FP8 e4m3fn per row", "INT8 dynamic"],
}
PACK_TYPES = ("Q8_0", "Q4_0", "Q4_K")


@dataclass
class Contender:
    """patcher: the MODEL that is measured, or lends its settings to `model`, a peer's module."""

    name: str
    patcher: Any
    model: Any = None
    weight_bytes: int = 0

    def caller(self, size: Size) -> Callable[[], torch.Tensor]:
        return caller(self.patcher, size, self.model)

    @property
    def blocks(self) -> dict[str, list[torch.nn.Module]]:
        return blocks(self.patcher.model if self.model is None else self.model)


def contenders(options: argparse.Namespace, size: Size, device: torch.device) -> list[Contender]:
    """Everything that is measured, loaded; the dense model first. Says what is left out, and why."""
    weights = random_weights(size, device)
    dense = dense_model(weights)
    load(dense)
    found = [Contender(DENSE, dense, weight_bytes=dense.model_size())]
    for name in options.formats:
        patcher = attempt(name, lambda name=name: quantized(dense, name))
        if patcher is not None:
            load(dense, patcher)
            found.append(Contender(f"Snug {name}", patcher, weight_bytes=patcher.model_size()))
    for name in peer_names() if options.peers else ():
        model = attempt(name, lambda name=name: peer(dense, name))
        if model is not None:
            found.append(Contender(name, dense, model, stored_bytes(model)))
    if options.peer_pack:
        found += peer_pack(options.peer_pack, weights)
        load(*(contender.patcher for contender in found if contender.model is None))
    return found


def attempt(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns; None, and a line for the reader, where this machine or library cannot."""
    try:
        return make()
    except Exception as error:  # whatever a library raises for hardware that it does not know
        print(
            f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", file=sys.stderr
        )
        return None


def peer_pack(checkout: Path, weights: dict[str, torch.Tensor]) -> list[Contender]:
    """The types that ComfyUI-GGUF and Snug both know, loaded by that pack from files that Snug has written."""
    from flux_step import load_peer

    writers = importlib.import_module("snug.quant_backends.writers")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        node = load_peer(checkout.resolve(), Path(folder))
        for name in PACK_TYPES:
            path = Path(folder) / f"flux-{name}.gguf"
            writers.write_gguf(path, dict(weights), name)
            patcher = attempt(f"ComfyUI-GGUF {name}", lambda path=path: node.load_unet(path.name)[0])
            if patcher is not None:
                found.append(Contender(f"ComfyUI-GGUF {name}", patcher, weight_bytes=patcher.model_size()))
    return found


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensors, taken apart where a library's subclass hides what it holds."""

    def count(tensor: torch.Tensor) -> int:
        names = getattr(tensor, "__tensor_flatten__", None)
        if names is None:
            return tensor.nbytes
        return sum(count(getattr(tensor, name)) for name in names()[0])

    return sum(count(tensor) for tensor in (*model.parameters(), *model.buffers()))


def compile_contender(contender: Contender) -> Contender:
    """The same, compiled block by block: by Snug's node, or a peer's blocks by torch.compile."""
    if contender.model is None:
        return Contender(contender.name, compiled(contender.patcher), None, contender.weight_bytes)
    for block in (block for members in contender.blocks.values() for block in members):
        block.forward = torch.compile(block.forward)
    return contender


def measure(found: list[Contender], size: Size, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A record for each contender that runs."""
    runs, errors, peaks = {}, {}, {}
    results: dict[str, torch.Tensor] = {}
    for contender in found:
        run = contender.caller(size)
        result = attempt(contender.name, run)  # the first call compiles
        if result is None:
            continue
        results.setdefault(DENSE, result)
        errors[contender.name] = relative_error(result, results[DENSE])
        peaks[contender.name] = peak_growth(run, device)
        runs[contender.name] = run
    parts = {contender.name: contender.blocks for contender in found if contender.name in runs}
    times = interleaved(runs, rounds, device, parts)
    return [
        {
            "name": contender.name,
            **figures(times[contender.name]),
            "error": errors[contender.name],
            "weight_bytes": contender.weight_bytes,
            "peak_bytes": peaks[contender.name],
        }
        for contender in found
        if contender.name in runs
    ]


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result - reference).float().norm() / reference.float().norm())


def figures(times: Times) -> dict[str, float]:
    double, single = times.seconds("double"), times.seconds("single")
    return {
        "double": double,
        "single": single,
        "step": step_of_full_model(double, single),
        "host": step_of_full_model(times.host_seconds("double"), times.host_seconds("single")),
        "call": times.seconds(),
    }


def mode_table(records: list[dict[str, Any]]) -> str:
    dense = records[0]
    header = [
        "",
        "double ms",
        "single ms",
        "step ms",
        "/ dense",
        "host ms",
        "call / dense",
        "error",
        "MB",
        "peak MB",
    ]
    rows = []
    for record in records:
        peak = record["peak_bytes"]
        rows.append(
            [
                record["name"],
                *(f"{record[part] * 1e3:.2f}" for part in ("double", "single")),
                f"{record['step'] * 1e3:.0f}",
                f"{record['step'] / dense['step']:.3f}",
                f"{record['host'] * 1e3:.0f}",
                f"{record['call'] / dense['call']:.3f}",
                f"{record['error']:.2%}",
                f"{record['weight_bytes'] / 1e6:.0f}",
                "–" if peak is None else f"{peak / 1e6:.0f}",
            ]
        )
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="*", help="targets of Quantize Model (Snug)")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), help="default: both on a GPU")
    parser.add_argument("--peers", action="store_true", help="also other libraries' layers")
    parser.add_argument("--peer-pack", type=Path, help="folder of a ComfyUI-GGUF checkout")
    run = begin(parser, peer_pack="ComfyUI-GGUF")
    options, command, device, size, facts = run.options, run.command, run.device, run.size, run.facts
    if options.formats is None:
        options.formats = FORMATS[device.type]
    modes = options.modes or (["eager", "compiled"] if device.type == "cuda" else ["eager"])

    text = heading("Flux blocks", command, facts)
    print(text)
    found = contenders(options, size, device)
    sections = {}
    for mode in modes:
        if mode == "compiled":
            found = [compile_contender(contender) for contender in found]
        sections[mode] = measure(found, size, device, options.rounds)
        section = f"\n### {mode}\n\n{mode_table(sections[mode])}\n"
        print(section, flush=True)
        text += section
        gc.collect()
    save(options, text, {"command": command, "environment": facts, "modes": sections})


if __name__ == "__main__":
    main()
