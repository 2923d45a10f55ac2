"""A quantized linear layer with LoRA: merged while its weight is decoded, or as a side branch, beside none at all.

    python benchmarks/lora_modes.py --markdown benchmarks/results/lora-modes.md

All ways take turns in one run, so that only their ratios to the layer without LoRA matter; those are shown. Merging as
ComfyUI does it makes the product, scales it and adds it; LoRA Mode's "automatic" adds it in one pass. The last column
is what "automatic" takes, and what the better choice would have taken, where that is another.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from snug_path import register_snug

register_snug()

from snug.quant_backends.core.packed import PackedTensor  # noqa: E402
from snug.quant_backends.formats import FORMATS  # noqa: E402
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed  # noqa: E402
from snug.quant_backends.kernels.linear import linear  # noqa: E402
from snug.quant_backends.kernels.low_rank import LowRankShape, add_low_rank, merge_low_rank  # noqa: E402

FEATURES = 2048
TOKENS = (1, 64, 512)
RANKS = (16, 128)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ways(
    x: torch.Tensor, weight: PackedTensor, down: torch.Tensor, up: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """What is measured, by name. x [tokens, in] in the compute dtype, the factors float32."""
    narrow_down, narrow_up = down.to(x.dtype), up.to(x.dtype)

    def merge_as_comfyui() -> torch.Tensor:
        dense = dequantize_packed(weight)
        dense += 0.5 * torch.mm(up, down)
        return F.linear(x, dense.to(x.dtype))

    def merge_in_one_pass() -> torch.Tensor:
        return F.linear(x, merge_low_rank(dequantize_packed(weight), down, up).to(x.dtype))

    def side_branch() -> torch.Tensor:
        return add_low_rank(linear(x, weight), x, narrow_down, narrow_up)

    return {
        "without LoRA": lambda: linear(x, weight),
        "merge": merge_as_comfyui,
        "merge in one pass": merge_in_one_pass,
        "side branch": side_branch,
    }


def measure(functions: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def row(format: str, dtype: str, rank: int, tokens: int, rounds: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(FEATURES, FEATURES, generator=generator) * 0.02
    weight = quantize_packed(values, FORMATS[format])
    down = torch.randn(rank, FEATURES, generator=generator) / FEATURES**0.5
    up = torch.randn(FEATURES, rank, generator=generator) * 0.01
    x = torch.randn(tokens, FEATURES, generator=generator).to(DTYPES[dtype])
    times = measure(ways(x, weight, down, up), rounds)
    plain = times.pop("without LoRA")
    branch = LowRankShape(FEATURES, FEATURES, rank).branch_pays(tokens, DTYPES[dtype], on_cpu=True)
    chosen = "side branch" if branch else "merge in one pass"
    best = min(times["side branch"], times["merge in one pass"])
    missed = "" if times[chosen] == best else f" (best {best / plain:.2f})"
    ratios = [f"{seconds / plain:.2f}" for seconds in times.values()]
    return [
        format,
        dtype,
        str(rank),
        str(tokens),
        f"{plain * 1e3:.1f}",
        *ratios,
        f"{times[chosen] / plain:.2f}{missed}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured")
    add_output_arguments(parser)
    arguments = parser.parse_args()
    cases = [("Q8_0", dtype, rank, tokens) for dtype in DTYPES for rank in RANKS for tokens in TOKENS]
    rows = []
    for case in cases:
        rows.append(row(*case, arguments.rounds))
        print(*rows[-1])
    columns = [
        "format",
        "computes in",
        "rank",
        "tokens",
        "without LoRA, ms",
        "merge",
        "merge in one pass",
        "side branch",
    ]
    facts = environment()
    title = f"LoRA on a layer of {FEATURES} x {FEATURES}: time by that without LoRA"
    text = heading(title, command_line(), facts) + "\n" + table([*columns, "automatic"], rows) + "\n"
    save(arguments, text, {"environment": facts, "columns": [*columns, "automatic"], "rows": rows})


if __name__ == "__main__":
    main()
