"""Every target that Snug sets itself, with what the newest tables say of it, and the gap.

    python benchmarks/targets.py --markdown benchmarks/results/targets.md --json benchmarks/results/targets.json

Reads benchmarks/results/*.json; what no table there has was not measured. Targets for a GPU are for a Flux at 1024 x
1024 on an H200, as ratios to bfloat16 in the same run and mode.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import add_output_arguments, command_line, save, table

RESULTS = Path(__file__).resolve().parent / "results"
NO_GPU = "needs a GPU"
Tables = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """limit: at most this, or at least where `at_least`. source: name of the result file without .json.

    find: what the file says of it, the worst where it has several; None where it does not.
    """

    name: str
    limit: float
    source: str
    find: Callable[[Any], float | None]
    at_least: bool = False
    missing: str = NO_GPU

    def measured(self, tables: Tables) -> float | None:
        return self.find(tables[self.source]) if self.source in tables else None

    def gap(self, value: float) -> str:
        """How far the value is on the wrong side, as part of the limit."""
        if not self.limit:
            return f"missed by {value:g}" if value else "met"
        missed = self.limit / value - 1 if self.at_least else value / self.limit - 1
        return "met" if missed <= 0 else f"missed by {missed:.0%}"


def worst(values: Iterable[float], at_least: bool = False) -> float | None:
    found = list(values)
    return (min(found) if at_least else max(found)) if found else None


def blocks(mode: str, *names: str) -> Callable[[Any], float | None]:
    """The largest ratio to dense of the contenders whose names start so, in a table of flux_blocks.py."""

    def find(result: Any) -> float | None:
        records = result["modes"].get(mode, [])
        return worst(record["step_ratio"] for record in records if record["name"].startswith(names))

    return find


def fast(way: str) -> Callable[[Any], float | None]:
    """The largest ratio to dense of one way of fast_matmul.py over the formats."""
    return lambda result: worst(
        record["dense_ratio"] for record in result["records"] if record.get("way") == way
    )


def block_peak(result: Any) -> float | None:
    records = result["modes"].get("eager", [])
    dense = records[0]["peak_bytes"] if records else None
    if not dense:
        return None
    return worst(
        (record["peak_bytes"] - dense) / 2**20 for record in records if record["name"].startswith("Snug")
    )


def loras(result: Any) -> float | None:
    return worst(
        record["seconds"]["4"] / record["seconds"]["0"]
        for record in result["records"]
        if record["way"] == "automatic"
    )


def offload(near: bool) -> Callable[[Any], float | None]:
    """near: where copying and computing take about as long as each other (within a fifth)."""

    def find(result: Any) -> float | None:
        return worst(
            record["snug_ratio"]
            for record in result["records"]
            if (0.8 < record["copying"] / record["computing"] < 1.25) == near
        )

    return find


def simulated(result: Any) -> float | None:
    return worst(
        step
        for figure in result["figures"]
        if figure["device"] == "simulated"
        for step in figure["step"].values()
    )


def decoding(other: str) -> Callable[[Any], float | None]:
    """The smallest advantage over another decoder, of all types and tables with one thread, as many as numpy uses."""

    def find(result: Any) -> float | None:
        return worst(
            (
                times[other] / times["snug"]
                for record in result["tables"]
                if record["threads"] == 1
                for times in record["milliseconds"].values()
                if other in times
            ),
            at_least=True,
        )

    return find


def steps(loader: str) -> Callable[[Any], float | None]:
    """The largest ratio to dense of one loader over formats and numbers of tokens."""
    return lambda result: worst(
        record["ratio"]
        for case in result["cases"]
        for record in case["records"]
        if record["loader"] == loader
    )


def to_the_kernel(result: Any) -> float | None:
    return worst(record["kernel"] for record in result["records"] if record["kernel"] is not None)


def bandwidth(*formats: str) -> Callable[[Any], float | None]:
    """The smallest part of the copy's bandwidth of these formats, or of all."""

    def find(result: Any) -> float | None:
        return worst(
            (r["bandwidth"] / r["copy"] for r in result["records"] if not formats or r["format"] in formats),
            at_least=True,
        )

    return find


def loading(way: str, *reachable: str) -> Callable[[Any], float | None]:
    """Of a file in the system's cache: a way's bandwidth by what can be reached, raw reading or less."""

    def find(result: Any) -> float | None:
        rates = {record["way"]: record["rate"] for record in result["records"] if not record["cold"]}
        if way not in rates:
            return None
        raw = max(rate for name, rate in rates.items() if name.startswith("raw"))
        return rates[way] / min([raw, *(rates[name] for name in reachable)])

    return find


def memory_while_used(result: Any) -> float | None:
    """Of quantized files; plain ones are loaded by ComfyUI."""
    records = [r for r in result["records"] if r["loader"] == "snug" and r["kind"] != "bf16"]
    return worst(max(r["loaded_ratio"], r["used_ratio"]) for r in records)


def recompiles(result: Any) -> float | None:
    return float(sum(r["graphs"] for r in result["records"] if r["change"] != "first call"))


def cold(result: Any) -> float | None:
    return worst(r["first"] for r in result["records"] if r["change"] == "first call")


BLOCKS = "flux-blocks-cuda"
FAST = "fast-matmul-cuda"
TARGETS = (
    Target("GGUF of every type, eager: step / bf16", 1.06, BLOCKS, blocks("eager", "Snug GGUF")),
    Target("GGUF of every type, compiled: step / bf16", 1.06, BLOCKS, blocks("compiled", "Snug GGUF")),
    Target("NF4: step / bf16", 1.04, BLOCKS, blocks("eager", "Snug bitsandbytes NF4")),
    Target("FP8 weight-only: step / bf16", 1.05, BLOCKS, blocks("eager", "Snug FP8 e4m3fn")),
    Target(
        "INT8 weight-only: step / bf16", 1.06, BLOCKS, blocks("eager", "Snug INT8 per", "Snug torchao int8")
    ),
    Target("INT4 weight-only: step / bf16", 1.06, BLOCKS, blocks("eager", "Snug quanto int4")),
    Target("FP8 products, compiled: step / bf16", 0.72, BLOCKS, blocks("compiled", "Snug FP8 dynamic")),
    Target("INT8 products: step / bf16", 0.78, BLOCKS, blocks("compiled", "Snug INT8 dynamic")),
    Target(
        "rotated INT8 from any format, eager: step / bf16", 0.78, FAST, fast("int8, rounded weights kept")
    ),
    Target("the same, rounded in each call: step / bf16", 0.78, FAST, fast("int8, rounded in each call")),
    Target("FP8 products from any format, eager: step / bf16", 0.72, FAST, fast("fp8, rounded weights kept")),
    Target("decoding, every type: bandwidth / copy", 0.85, "decoding-cuda", bandwidth(), at_least=True),
    Target(
        "decoding, Q8_0, Q4_K: bandwidth / copy",
        0.9,
        "decoding-cuda",
        bandwidth("Q8_0", "Q4_K"),
        at_least=True,
    ),
    Target("memory beyond dense's in a step, MiB", 132, BLOCKS, block_peak),
    Target("4 LoRAs of rank 32: step / none", 1.04, "flux-lora-cuda", loras),
    Target("offloaded step / max(compute, copy)", 1.05, "flux-offload-cuda", offload(near=False)),
    Target("the same, where both are equal", 1.10, "flux-offload-cuda", offload(near=True)),
    Target("offloaded step / max, simulated device", 1.10, "offload-plan", simulated),
    Target(
        "file in the cache to the GPU / min(reading, link)",
        0.8,
        "loading-cuda",
        loading("staged to the GPU", "link"),
        at_least=True,
    ),
    Target("file in the cache to memory / reading", 0.8, "loading-cpu", loading("slab"), at_least=True),
    Target("most memory while loading and used / file", 1.1, "loading-memory", memory_while_used),
    Target(
        "opening a GGUF file of 150,000 tokens, seconds",
        0.1,
        "gguf-header",
        lambda result: result["rows"][0]["snug_s"],
    ),
    Target("cold compile, seconds", 12, "flux-compile-cuda", cold),
    Target("graphs compiled again on LoRA, strength, size, residency", 0, "flux-compile-cpu", recompiles),
    Target(
        "CPU, one thread: numpy's time / ours, every type",
        2.5,
        "dequantize-cpu",
        decoding("numpy"),
        at_least=True,
    ),
    Target(
        "CPU, one thread: best-known pack's time / ours", 3, "dequantize-cpu", decoding("peer"), at_least=True
    ),
    Target("CPU, with libgguf: GGUF step / dense", 1.5, "flux-step-cpu", steps("snug")),
    Target("CPU, torch alone: GGUF step / dense", 1.5, "flux-step-cpu", steps("torch alone")),
    Target("Linear.forward to the kernel, µs", 60, "host-time-cpu", to_the_kernel),
)


def read_tables() -> Tables:
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))
    }


def rows(tables: Tables) -> list[list[str]]:
    lines = []
    for target in TARGETS:
        value = target.measured(tables)
        lines.append(
            [
                target.name,
                f"{'at least' if target.at_least else 'at most'} {target.limit:g}",
                "not measured" if value is None else f"{value:.3g}",
                target.missing if value is None else target.gap(value),
                f"[{target.source}]({target.source}.md)" if value is not None else "–",
            ]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_output_arguments(parser)
    options = parser.parse_args()
    header = ["target", "limit", "measured (the worst)", "gap", "from"]
    found = rows(read_tables())
    text = f"# Targets\n\n`{command_line()}`\n\n{table(header, found)}\n"
    print(text)
    save(options, text, {"rows": [dict(zip(header, row, strict=True)) for row in found]})


if __name__ == "__main__":
    main()
