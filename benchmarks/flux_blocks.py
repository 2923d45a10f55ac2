"""One step of a Flux, eager and compiled: dense, in Snug's formats, and with other libraries' layers, side by side.

    python benchmarks/flux_blocks.py --markdown benchmarks/results/flux-blocks-cpu.md \
        --json benchmarks/results/flux-blocks-cpu.json
    python benchmarks/flux_blocks.py --double 19 --single 38 --peers --formats "GGUF Q8_0" "GGUF Q4_K"

Needs a ComfyUI in $SNUG_COMFYUI_PATH. On a GPU the layers are Flux.1-dev's, in bfloat16, for a picture of 1024 x 1024;
on a CPU they are narrower, in float32 as ComfyUI computes there. Every contender takes turns with the dense model of
the same mode, and ratios are to that one in the same turns: only two models are in memory at a time, and a run that is
ended before its time has written what it has measured, the formats that are used most first. A step of the whole model
is put together from one double and one single block (19 and 38 of them); with as many blocks as the real model has, the
column "call" is one. Host: the time until Python has handed all work to the device. Error: of the result, relative to
the dense model's. Peers use their own layer inside the same blocks, where the library is installed and runs on the
device; --peer-pack measures a checkout of ComfyUI-GGUF by its own loader, too.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flux_model import (
    Run,
    Size,
    attempt,
    begin,
    blocks,
    caller,
    compiled,
    dense_model,
    free_memory,
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
        "GGUF Q8_0",
        "GGUF Q4_K",
        "bitsandbytes NF4",
        "FP8 e4m3fn per row",
        "INT8 per row",
        "INT8 dynamic",
    ]
    + ["FP8 dynamic", "torchao int8", "quanto int4"]
    + [f"GGUF {name}" for name in ("Q6_K", "Q5_K", "Q4_0", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K")],
    "cpu": ["GGUF Q8_0", "GGUF Q4_K", "bitsandbytes NF4", "FP8 e4m3fn per row", "INT8 dynamic"],
}
# Entries of torch.compile's cache for one class of blocks, of which every contender takes some.
COMPILED_AT_MOST = 512
PACK_TYPES = ("Q8_0", "Q4_0", "Q4_K")


@dataclass
class Contender:
    """patcher: the MODEL that is measured, or lends its settings to `model`, a peer's module."""

    name: str
    patcher: Any
    model: Any = None

    @property
    def weight_bytes(self) -> int:
        return self.patcher.model_size() if self.model is None else stored_bytes(self.model)

    def caller(self, size: Size) -> Callable[[], torch.Tensor]:
        return caller(self.patcher, size, self.model)

    @property
    def blocks(self) -> dict[str, list[torch.nn.Module]]:
        return blocks(self.patcher.model if self.model is None else self.model)


def makers(
    options: argparse.Namespace, dense: Any, weights: dict[str, torch.Tensor], folder: Path
) -> dict[str, Callable[[], Contender]]:
    """What makes each contender but the dense one. folder: for the files of --peer-pack."""
    found: dict[str, Callable[[], Contender]] = {}
    for name in options.formats:
        found[f"Snug {name}"] = lambda name=name: Contender(f"Snug {name}", quantized(dense, name))
    for name in peer_names() if options.peers else ():
        found[name] = lambda name=name: Contender(name, dense, peer(dense, name))
    for name in PACK_TYPES if options.peer_pack else ():
        found[f"ComfyUI-GGUF {name}"] = lambda name=name: in_peer_pack(
            name, options.peer_pack, weights, folder
        )
    return found


def in_peer_pack(name: str, checkout: Path, weights: dict[str, torch.Tensor], folder: Path) -> Contender:
    """A type that ComfyUI-GGUF and Snug both know, loaded by that pack from a file that Snug has written."""
    from flux_step import load_peer

    path = folder / f"flux-{name}.gguf"
    if not path.exists():
        importlib.import_module("snug.quant_backends.writers").write_gguf(path, dict(weights), name)
    return Contender(f"ComfyUI-GGUF {name}", load_peer(checkout.resolve(), folder).load_unet(path.name)[0])


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
        return Contender(contender.name, compiled(contender.patcher))
    for block in (block for members in contender.blocks.values() for block in members):
        block.forward = torch.compile(block.forward)
    return contender


def measure(
    dense: Contender, other: Contender, size: Size, device: torch.device, rounds: int
) -> dict[str, Any]:
    """The record of a contender beside the dense one, which may be itself."""
    runs = {contender.name: contender.caller(size) for contender in (dense, other)}
    results = {name: run() for name, run in runs.items()}  # the first call compiles
    peak = peak_growth(runs[other.name], device)
    parts = {contender.name: contender.blocks for contender in (dense, other)}
    times = interleaved(runs, rounds, device, parts)
    found, beside = figures(times[other.name]), figures(times[dense.name])
    return {
        "name": other.name,
        **found,
        **{f"{part}_ratio": found[part] / beside[part] for part in ("step", "call")},
        "error": relative_error(results[other.name], results[dense.name]),
        "weight_bytes": other.weight_bytes,
        "peak_bytes": peak,
    }


def records(
    made: dict[str, Callable[[], Contender]], dense: Contender, mode: str, run: Run
) -> Iterator[dict[str, Any]]:
    """A record for each contender that runs, the dense one first. Says what is left out, and why."""

    def measured(make: Callable[[], Contender]) -> dict[str, Any]:
        contender = make()
        if contender.model is None:
            load(dense.patcher, contender.patcher)
        if mode == "compiled":
            contender = compile_contender(contender)
        try:
            return measure(reference, contender, run.size, run.device, run.options.rounds)
        finally:
            if contender.model is None:
                contender.patcher.detach()

    reference = compile_contender(dense) if mode == "compiled" else dense
    yield measure(reference, reference, run.size, run.device, run.options.rounds)
    for name, make in made.items():
        record = attempt(f"{name}, {mode}", lambda make=make: measured(make))
        free_memory()
        if record is not None:
            yield record


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
                f"{record['step_ratio']:.3f}",
                f"{record['host'] * 1e3:.0f}",
                f"{record['call_ratio']:.3f}",
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

    config, name = torch._dynamo.config, "recompile_limit"  # type: ignore[attr-defined]
    setattr(config, name if hasattr(config, name) else "cache_size_limit", COMPILED_AT_MOST)

    weights = random_weights(size, device)
    dense = Contender(DENSE, dense_model(weights))
    load(dense.patcher)
    sections: dict[str, list[dict[str, Any]]] = {}
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        made = makers(options, dense.patcher, weights, Path(folder))
        for mode in modes:
            sections[mode] = []
            for record in records(made, dense, mode, run):
                sections[mode].append(record)
                print(record, flush=True)
                text = heading("Flux blocks", command, facts)
                text += "".join(f"\n### {name}\n\n{mode_table(found)}\n" for name, found in sections.items())
                save(options, text, {"command": command, "environment": facts, "modes": sections})
    print(text)


if __name__ == "__main__":
    main()
