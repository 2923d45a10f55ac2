r"""Opening a GGUF file with a large vocabulary: Snug's reader beside the gguf package's.

    python benchmarks/gguf_header.py --markdown benchmarks/results/gguf-header.md \
        --json benchmarks/results/gguf-header.json

The file is generated: tokens, merges, scores and token types of a tokenizer of the given size, and one tensor. Each
time is processor time, which other programs disturb least, and the best of several runs in one process with the file
in the page cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from report import add_output_arguments, command_line, environment, heading, save, table

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
        "command": command_line(),
        "environment": environment("gguf"),
        "vocabulary": vocabulary,
        "file_bytes": size,
        "rows": rows,
    }


def as_markdown(result: dict[str, Any]) -> str:
    rows = [
        [row["case"], f"{row['snug_s'] * 1e3:.1f}", f"{row['gguf_s'] * 1e3:.1f}", f"{row['ratio']:.0f}"]
        for row in result["rows"]
    ]
    return "\n".join(
        [
            heading("Opening a GGUF file with a large vocabulary", result["command"], result["environment"]),
            f"{result['vocabulary']:,} tokens, as many merges, scores and token types; "
            f"{result['file_bytes'] / 1e6:.1f} MB. Processor time, best of several runs, file in the page cache.",
            "",
            table(["", "Snug ms", "gguf package ms", "gguf / Snug"], rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=150_000, help="number of tokens and of merges")
    parser.add_argument(
        "--runs", type=int, default=15, help="runs of Snug's reader; the package gets a fifth"
    )
    add_output_arguments(parser)
    options = parser.parse_args()
    result = measure(options.vocabulary, options.runs)
    text = as_markdown(result)
    print(text)
    save(options, text, result)


if __name__ == "__main__":
    main()
