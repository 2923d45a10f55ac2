"""How near decoding comes to the bandwidth of memory: bytes read and written per second, beside those of a copy.

    python benchmarks/decoding.py --markdown benchmarks/results/decoding-cuda.md \
        --json benchmarks/results/decoding-cuda.json

The copy moves as many bytes in the same run, in turns with the decoders; the figure to look at is the last one. Several
weights of each format are decoded in turn, so that together they exceed the caches. --peer measures the dequant.py of a
ComfyUI-GGUF checkout too (to bfloat16 through float32, as Snug does). Shapes: those of Flux.1-dev's layers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import add_output_arguments, command_line, environment, heading, save, table
from timing import interleaved

for folder in ("scripts", "tests/support"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
from snug_path import register_snug  # noqa: E402

register_snug()
from random_packed import random_packed  # noqa: E402
from snug.quant_backends.core.packed import PackedTensor  # noqa: E402
from snug.quant_backends.formats import FORMATS  # noqa: E402
from snug.quant_backends.kernels.dequantize import dequantize_packed  # noqa: E402

SHAPES = {"cuda": ((3072, 3072), (21504, 3072), (3072, 15360)), "cpu": ((512, 3072),)}
SCALED = ("bnb-nf4-64", "bnb-nf4-64-nested-256", "int8-rows", "quanto-int4-128", "float8_e4m3fn-rows")
# Those that files have most first.
FORMATS_BY_USE = list(
    dict.fromkeys(["Q8_0", "Q4_K", *SCALED, *(n for n, f in FORMATS.items() if f.dtype is None)])
)
# Bytes that weights of one format take together, more than any cache holds.
ROTATED = {"cuda": 512 << 20, "cpu": 8 << 20}


def weights_of(name: str, shape: tuple[int, int], device: torch.device) -> list[PackedTensor]:
    """Random packed weights, different ones, and enough of them."""
    first = random_packed(name, shape, torch.bfloat16)
    count = max(2, min(64, ROTATED[device.type] // (first.nbytes + 2 * shape[0] * shape[1])))
    return [moved(first, device) for _ in range(count)]


def moved(packed: PackedTensor, device: torch.device) -> PackedTensor:
    """A copy of its own on the device."""
    parts = {name: part.to(device, copy=True) for name, part in packed.parts.items()}
    return PackedTensor(packed.data.to(device, copy=True), packed.format, packed.shape, parts)


def rotating(
    decode: Callable[[PackedTensor, torch.Tensor], Any], weights: list[PackedTensor], outs: Any
) -> Any:
    """Decodes all weights, each to a buffer of its own."""

    def run() -> None:
        for weight, out in zip(weights, outs, strict=True):
            decode(weight, out)

    return run


def measure(
    name: str, shape: tuple[int, int], device: torch.device, rounds: int, peer: Any
) -> dict[str, Any]:
    weights = weights_of(name, shape, device)
    outs = [torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in weights]
    moved_bytes = weights[0].nbytes + outs[0].nbytes
    source = [torch.empty(moved_bytes // 2, dtype=torch.uint8, device=device) for _ in weights]
    there = [torch.empty_like(buffer) for buffer in source]
    runs = {
        "copy": lambda: [to.copy_(buffer) for to, buffer in zip(there, source, strict=True)],
        "snug": rotating(lambda w, out: dequantize_packed(w, torch.bfloat16, out), weights, outs),
    }
    ggml = FORMATS.get(name)
    if peer is not None and ggml is not None:
        gguf = __import__("gguf").GGMLQuantizationType[name]
        if gguf in peer.dequantize_functions:
            decode = partial(peer.dequantize, qtype=gguf, oshape=shape, dtype=torch.float32)
            try:
                decode(weights[0].data)
                runs["peer"] = rotating(lambda w, out: out.copy_(decode(w.data)), weights, outs)
            except Exception as error:  # whatever it raises where it cannot
                print(f"left out: {name} by the peer: {type(error).__name__}: {error}", file=sys.stderr)
    times = interleaved(runs, rounds, device, warm_up=2)
    speed = {key: len(weights) * moved_bytes / times[key].seconds() for key in runs}
    return {
        "format": name,
        "shape": shape,
        "bandwidth": speed["snug"],
        "copy": speed["copy"],
        "peer": speed.get("peer"),
        "host": times["snug"].host_seconds() / len(weights),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--formats", nargs="+", default=FORMATS_BY_USE)
    parser.add_argument("--rounds", type=int, help="default: 20 on a GPU, 3 on a CPU")
    parser.add_argument("--peer", help="dequant.py of a ComfyUI-GGUF checkout")
    add_output_arguments(parser)
    options = parser.parse_args()
    command = command_line(peer="ComfyUI-GGUF/dequant.py")
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    peer = None
    if options.peer:
        from dequantize import load_peer

        peer = load_peer(options.peer)
    facts, records, text = environment(), [], ""
    for shape, name in itertools.product(SHAPES[device.type], options.formats):
        try:
            record = measure(name, shape, device, options.rounds or (20 if cuda else 3), peer)
        except Exception as error:  # one format must not end the table
            print(f"left out: {name}, {shape}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        records.append(record)
        print(record, flush=True)
        text = f"{heading('Decoding to bfloat16 beside a copy', command, facts)}\n{rows(records, cuda)}\n"
        save(options, text, {"command": command, "environment": facts, "records": records})
    print(text)


def rows(records: list[dict[str, Any]], cuda: bool) -> str:
    """The table of the records."""
    header = ["format, shape", "GB/s", "copy GB/s", "peer GB/s", "host us a weight", "Snug / copy"]
    lines = [
        [
            f"{r['format']}, {r['shape'][0]} x {r['shape'][1]}",
            f"{r['bandwidth'] / 1e9:.0f}" if cuda else f"{r['bandwidth'] / 1e9:.2f}",
            f"{r['copy'] / 1e9:.0f}",
            "–" if r["peer"] is None else f"{r['peer'] / 1e9:.2f}",
            f"{r['host'] * 1e6:.0f}",
            f"{r['bandwidth'] / r['copy']:.2f}",
        ]
        for r in records
    ]
    return table(header, lines)


if __name__ == "__main__":
    main()
