"""What the GPU kernels compile to: instructions for each weight, widths of accesses, registers. Needs no GPU.

    python benchmarks/kernel_code.py --markdown benchmarks/results/kernel-code.md \
        --json benchmarks/results/kernel-code.json

Triton compiles each kernel for the given generation as it would on such a GPU, for a weight of 3072 x 3072 and results
in bfloat16. Counted are instructions of PTX: all of a decoding kernel, the inner loop of a product, divided by the
weights that a thread decodes in it. The bound is what a GPU could issue while its memory moves the packed weight and
the decoded one: above it, arithmetic takes longer than memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

for folder in ("scripts", "tests/support"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
from snug_path import register_snug  # noqa: E402

register_snug()
from compiled_kernels import (  # noqa: E402
    Code,
    Launch,
    compiled,
    decoding_launch,
    product_launches,
    rounding_launch,
)
from random_packed import random_packed  # noqa: E402
from snug.quant_backends.core.packed import PackedTensor  # noqa: E402
from snug.quant_backends.formats import FORMATS  # noqa: E402
from snug.quant_backends.kernels.gpu import launch  # noqa: E402

SHAPE = (3072, 3072)
SCALED = (
    "bnb-nf4-64",
    "bnb-nf4-64-nested-256",
    "int8-rows",
    "int8-rows-scb",
    "int8-1x32-zero",
    "float8_e4m3fn-tensor",
    "float8_e5m2-tensor",
    "quanto-int4-128",
    "quanto-int2-64",
    "int8-rows-rotated-256",
)
TOKENS = (1, 2, 4, 8, 16, 64)
# Rows of x that are multiplied both with and without matrix units, to see from how many on those are better.
BOTH_WAYS = 8
# Columns that are rotated together before rounding to 8 bits.
ROTATED = {"int8": 256, "float8_e4m3fn": 1}
# From data sheets: multiprocessors, clock in GHz, memory in GB/s; each multiprocessor issues for 128 lanes a clock.
GPUS = {80: (108, 1.41, 1555), 86: (82, 1.70, 936), 89: (128, 2.52, 1008), 90: (132, 1.83, 4800)}
LANES = 128


def bound(capability: int, bits: float) -> float:
    """Instructions for each weight that are issued while `bits` packed and 16 decoded bits are moved."""
    processors, gigahertz, bandwidth = GPUS[capability]
    return processors * LANES * gigahertz / (bandwidth / ((bits + 16) / 8))


def widths(accesses: dict[int, int], weights: float) -> str:
    """Accesses by width, as the number of weights for each."""
    return ", ".join(
        f"{weights / count:.3g} ({width} B)" for width, count in sorted(accesses.items(), reverse=True)
    )


def in_short(code: Code) -> str:
    return f"{code.per_weight:.1f} / {code.registers}"


def record(code: Code) -> dict[str, Any]:
    return {
        "instructions_per_weight": code.per_weight,
        "weights_per_thread": code.weights,
        "loads": code.loads,
        "stores": code.stores,
        "shared_bytes": code.shared,
        "registers": code.registers,
        "spilled_bytes": code.spilled,
    }


def without_matrix_units(packed: PackedTensor, tokens: int) -> Launch:
    """How so many rows would be multiplied by the kernel for the fewest."""
    most, launch.MOST_VECTORS = launch.MOST_VECTORS, tokens
    launch._product_plan.cache_clear()
    try:
        return product_launches(packed, tokens, torch.bfloat16)[0]
    finally:
        launch.MOST_VECTORS = most
        launch._product_plan.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, default=90, choices=GPUS, help="such as 89 for RTX 40")
    add_output_arguments(parser)
    options = parser.parse_args()
    launch.multiprocessors = lambda device: GPUS[options.capability][0]
    formats = [name for name, fmt in FORMATS.items() if fmt.dtype is None] + list(SCALED)
    decoding, products, rounding, found = [], [], [], {}
    for name in formats:
        packed = random_packed(name, SHAPE)
        bits = packed.nbytes * 8 / (SHAPE[0] * SHAPE[1])
        code = compiled(decoding_launch(packed, torch.bfloat16), options.capability)
        changed = compiled(decoding_launch(packed, torch.bfloat16, rank=32), options.capability)
        found[name] = {"bits_per_weight": bits, "decode": record(code), "low_rank_loop": record(changed)}
        decoding.append(
            [
                name,
                f"{bits:.2f}",
                f"{code.per_weight:.1f}",
                f"{bound(options.capability, bits):.1f}",
                widths(code.loads, code.weights),
                widths(code.stores, code.weights),
                f"{code.shared}",
                f"{code.registers}",
                f"{code.spilled}",
                f"{changed.per_weight:.1f}",
            ]
        )
        codes = {
            tokens: compiled(product_launches(packed, tokens, torch.bfloat16)[0], options.capability)
            for tokens in TOKENS
        }
        found[name]["products"] = {str(tokens): record(code) for tokens, code in codes.items()}
        vectors = compiled(without_matrix_units(packed, BOTH_WAYS), options.capability)
        found[name]["without_matrix_units"] = record(vectors)
        products.append([name, *(in_short(code) for code in [*codes.values(), vectors])])
        rounded = {
            stored: compiled(rounding_launch(packed, stored, width), options.capability)
            for stored, width in ROTATED.items()
        }
        found[name]["rounding"] = {stored: record(code) for stored, code in rounded.items()}
        rounding.append(
            [
                name,
                *(
                    text
                    for code in rounded.values()
                    for text in (in_short(code), f"{code.spilled}", widths(code.stores, code.weights))
                ),
            ]
        )
        print(f"compiled: {name}", file=sys.stderr)
    command = command_line()
    facts = environment("triton") | {"compiled for": f"compute capability {options.capability}"}
    header = ["format", "bits", "PTX per weight", "bound", "weights per load (width)", "per store"]
    header += ["shared B", "registers", "spilled B", "more for 16 ranks"]
    text = "\n\n".join(
        [
            heading("What the GPU kernels compile to", command, facts),
            "Decoding:",
            table(header, decoding),
            "Products, PTX per weight and step of the inner loop / registers, by rows of x:",
            table(
                ["format", *(str(tokens) for tokens in TOKENS), f"{BOTH_WAYS} without matrix units"], products
            ),
            "Rounding to 8 bits, PTX per weight / registers:",
            table(
                [
                    "format",
                    "int8, rotated",
                    "spilled B",
                    "weights per store",
                    "fp8",
                    "spilled B",
                    "per store",
                ],
                rounding,
            ),
        ]
    )
    print(text)
    save(options, text + "\n", {"command": command, "environment": facts, "formats": found})


if __name__ == "__main__":
    main()
