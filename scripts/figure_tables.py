"""Write the tables of figures in README.md and docs/choosing.md from benchmarks/results, between their markers.

python scripts/figure_tables.py            # rewrites what is out of date
python scripts/figure_tables.py --check    # only says what is, and fails
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from snug_path import ROOT
from support_table import updated

BEGIN, END = "<!-- figures: made by scripts/figure_tables.py -->", "<!-- end of figures -->"
RESULTS = ROOT / "benchmarks" / "results"

# Parameters of the diffusion model alone, in billions, as published.
MODELS = {
    "SDXL": 2.57,
    "Z-Image": 6.15,
    "SD3.5 Large": 8.06,
    "Flux.1": 11.9,
    "Wan 14B": 14.3,
    "Qwen-Image": 20.4,
}
# From the most exact to the smallest, as *Quantize Model (Snug)* calls them.
FORMATS = (
    "GGUF BF16",
    "GGUF Q8_0",
    "INT8 per row",
    "FP8 e4m3fn per row",
    "GGUF Q6_K",
    "GGUF Q5_K_M",
    "GGUF Q4_K_M",
    "bitsandbytes NF4 double",
    "GGUF Q3_K_M",
    "GGUF Q2_K",
)
# Of what pictures become, in README.
FIDELITY = (
    "dense",
    "GGUF Q8_0",
    "INT8 per row",
    "FP8 e4m3fn per row",
    "GGUF Q6_K",
    "GGUF Q5_K_M",
    "GGUF Q4_K_M",
    "bitsandbytes NF4",
    "GGUF Q3_K_M",
    "GGUF Q2_K",
)
# What the second table chooses from: the most exact of each size.
CHOICES = ("GGUF BF16", "GGUF Q8_0", "GGUF Q6_K", "GGUF Q5_K_M", "GGUF Q4_K_M", "GGUF Q3_K_M")
CARDS = (6, 8, 10, 12, 16, 24)  # GB
RESERVE = 2.5  # GB for sampling at about a megapixel and for the desktop: an assumption, not a measurement
# The commit that the results shown in README were made at.
COMMITS = {"flux-step-cpu": "182dc8e", "loading-memory": "752fa08", "fidelity": "182dc8e"}


def blocks() -> dict[Path, Callable[[], str]]:
    return {ROOT / "README.md": readme_figures, ROOT / "docs" / "choosing.md": choosing_tables}


def readme_figures() -> str:
    steps, loading = _result("flux-step-cpu"), _result("loading-memory")
    header = (
        "Flux on a CPU",
        "tokens",
        "Snug with libgguf / dense",
        "without / dense",
        "ComfyUI-GGUF / dense",
        "error of the step",
    )
    rows = []
    for case in (steps["cases"][0], steps["cases"][-1]):
        by_loader: dict[str, dict[str, Any]] = {}
        for record in case["records"]:
            by_loader.setdefault(record["loader"], {})[record["format"]] = record
        for name, own in by_loader["snug"].items():
            peer = by_loader["peer"].get(name)
            rows.append(
                (
                    name,
                    str(case["tokens"]),
                    f"{own['ratio']:.2f}",
                    f"{by_loader['torch alone'][name]['ratio']:.2f}",
                    f"{peer['ratio']:.2f}" if peer else "–",
                    f"{own['error']:.2%}",
                )
            )
    used = [
        f"{record['kind']} {record['used_ratio']:.2f}"
        for record in _of_snug(loading)
        if record["kind"] != "bf16"
    ]
    return "\n".join(
        [
            _table(header, rows),
            "",
            "Seconds for a step as a multiple of the unquantized model's: less is better. "
            + _origin(steps, "flux-step-cpu"),
            "",
            f"Peak memory of loading and a first step, as a multiple of the file: {', '.join(used)}. "
            + _origin(loading, "loading-memory"),
            "",
            fidelity_figures(_result("fidelity")),
            "",
            f"The pack adds {min(run['seconds'] for run in _result('import-time')['runs']):.1f} s of processor time to "
            "ComfyUI's start ([measured](benchmarks/results/import-time.md)).",
        ]
    )


def fidelity_figures(result: Mapping[str, Any]) -> str:
    """What formats do to the digits that a tiny trained model draws."""
    measured = {row["target"]: row for row in result["rows"]}
    rows = []
    for name in FIDELITY:
        row = measured[name]
        figures = ("–", "–") if name == "dense" else (f"{row['psnr']:.1f} dB", f"{row['ssim']:.4f}")
        rows.append((name, f"{row['accuracy']:.1%}", *figures))
    return "\n".join(
        [
            _table(("a tiny model that draws digits", "recognised", "PSNR", "SSIM"), rows),
            "",
            f"{result['environment']['pictures']}; recognised by a classifier of handwritten digits, PSNR and SSIM "
            "against the dense model's pictures. They tell how formats compare, not how a large model fares. "
            + _origin(result, "fidelity"),
        ]
    )


def choosing_tables() -> str:
    rows = {row["target"]: row for row in _result("formats")["rows"]}
    header = ("format", "bits per weight", "error of weights", "error of a Flux block", *MODELS)
    sizes = []
    for name in FORMATS:
        row = rows[name]
        error = row["output_errors"]["flux"]
        figures = (f"{row['bits']:.2f}", f"{row['weight_error']:.1%}", f"{error:.1%}")
        sizes.append((name, *figures, *(f"{_gigabytes(size, row):.1f}" for size in MODELS.values())))
    cards = [(f"{card} GB", *(_largest(size, card, rows) for size in MODELS.values())) for card in CARDS]
    return "\n".join([_table(header, sizes), "", _table(("card", *MODELS), cards)])


def _gigabytes(billions: float, row: Mapping[str, Any]) -> float:
    return billions * row["bits"] / 8


def _largest(billions: float, card: int, rows: Mapping[str, Mapping[str, Any]]) -> str:
    for name in CHOICES:
        if _gigabytes(billions, rows[name]) + RESERVE <= card:
            return name.removeprefix("GGUF ")
    return "offload"


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _of_snug(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [record for record in result["records"] if record["loader"] == "snug"]


def _origin(result: Mapping[str, Any], name: str) -> str:
    facts = result["environment"]
    hardware = f"{facts['processor']}, torch {facts['torch']}, commit {COMMITS[name]}"
    return f"([all](benchmarks/results/{name}.md); {hardware}; `{result['command']}`)"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["--:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def outdated() -> Iterator[tuple[Path, str]]:
    """The files whose tables are not what the results say, with what they should contain."""
    for path, block in blocks().items():
        text = path.read_text(encoding="utf-8")
        wanted = updated(text, block(), BEGIN, END)
        if wanted != text:
            yield path, wanted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    found = list(outdated())
    for path, text in found:
        print(f"{path.relative_to(ROOT)} is out of date" + ("" if check else ": rewritten"))
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
