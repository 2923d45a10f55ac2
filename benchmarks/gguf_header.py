r"""Opening a GGUF file with a large vocabulary: Snug's reader beside the gguf package's.

    python benchmarks/gguf_header.py --markdown benchmarks/results/gguf-header.md \
        --json benchmarks/results/gguf-header.json

The file is generated: tokens, merges, scores and token types of a tokenizer of the given size, and one tensor. Each
time is processor time, which other programs disturb least, and the best of several runs in one process with the file
in the page cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from snug_path import register_snug

register_snug()
from snug.quant_backends.readers import GGUFFile  # noqa: E402  (needs the registration above)

TOKENS = "tokenizer.ggml.tokens"


def write_file(path: Path, vocabulary: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array(TOKENS, [f"Ġtoken{index}" for index in range(vocabulary)])
    writer.add_array("tokenizer.ggml.merges", [f"Ġto{index} ken{index}" for index in range(vocabulary)])
    writer.add_array("tokenizer.ggml.scores", [float(-index) for index in range(vocabulary)])
    writer.add_array("tokenizer.ggml.token_type", [1] * vocabulary)
    writer.add_tensor("output_norm.weight", np.ones(4096, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def best_time(action: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return min(times)


def package_tokens(path: Path) -> list[str]:
    field = gguf.GGUFReader(path).get_field(TOKENS)
    assert field is not None
    return field.contents()


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor()
    )


def measure(vocabulary: int, runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_file(path, vocabulary)
        assert list(GGUFFile(path).metadata[TOKENS]) == package_tokens(path)  # type: ignore[arg-type]
        cases = {
            "open": (lambda: GGUFFile(path), lambda: gguf.GGUFReader(path)),
            "open and read all tokens": (
                lambda: GGUFFile(path).metadata[TOKENS],
                lambda: package_tokens(path),
            ),
        }
        rows = []
        for name, (ours, theirs) in cases.items():
            snug, package = best_time(ours, runs), best_time(theirs, max(1, runs // 5))
            rows.append({"case": name, "snug_s": snug, "gguf_s": package, "ratio": package / snug})
        size = path.stat().st_size
    return {
        "command": shlex.join(["python", "benchmarks/gguf_header.py", *sys.argv[1:]]),
        "environment": {
            "processor": processor(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "gguf": version("gguf"),
            "torch": version("torch"),
        },
        "vocabulary": vocabulary,
        "file_bytes": size,
        "rows": rows,
    }


def as_markdown(result: dict[str, Any]) -> str:
    environment = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    lines = [
        "# Opening a GGUF file with a large vocabulary",
        "",
        f"{result['vocabulary']:,} tokens, as many merges, scores and token types; "
        f"{result['file_bytes'] / 1e6:.1f} MB. Processor time, best of several runs, file in the page cache.",
        "",
        "| | Snug | gguf package | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['snug_s'] * 1e3:.1f} ms | {row['gguf_s'] * 1e3:.1f} ms | {row['ratio']:.0f} x |"
        for row in result["rows"]
    ]
    return "\n".join([*lines, "", f"Environment: {environment}.", "", f"Made by `{result['command']}`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=150_000, help="number of tokens and of merges")
    parser.add_argument(
        "--runs", type=int, default=15, help="runs of Snug's reader; the package gets a fifth"
    )
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    result = measure(options.vocabulary, options.runs)
    table = as_markdown(result)
    print(table)
    if options.markdown:
        options.markdown.write_text(table, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
