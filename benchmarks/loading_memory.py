"""Memory that loading a diffusion model takes: Snug, ComfyUI's own loader and, if given, a peer pack.

    python benchmarks/loading_memory.py --peer path/to/ComfyUI-GGUF \
        --markdown benchmarks/results/loading-memory.md --json benchmarks/results/loading-memory.json

Run it on Linux with the Python that ComfyUI runs with, and SNUG_COMFYUI_PATH set (`scripts/bootstrap.py
--print-env`). It needs disk for one file of the wanted size, and memory for three.

Each file is a Flux with its real layers and as many blocks as the size asks for, made in a temporary folder. A fresh
process loads it, everything that the loader imports being imported before. Peak resident memory is the kernel's own
(VmHWM, reset before loading) above what was resident then, and in multiples of the file: until the model is loaded,
and until one small step on the CPU has used every weight, so that pages which are only mapped do not count for
nothing. Pages of the mapped file count as long as they are resident, although the system can drop them at any time;
the second table tells them (file) from memory that it cannot drop (anonymous).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from flux_step import load_peer, step_inputs
from large_files import GGUF_KINDS, KINDS, file_name, make_file
from snug_path import register_snug
from tiny import use_comfyui

TITLE = "Memory while a diffusion model is loaded"
LIMIT = 1.10  # times the file, at most
PLAIN = "bf16"
CORE_KINDS = ("fp8", PLAIN)
SPLIT = ("peak", "anonymous", "file", "pss")
STATUS = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon", "file": "RssFile"}
PIXELS, TEXT_TOKENS = 16, 1  # the smallest step
MIB = 1 << 20


def memory() -> dict[str, int]:
    """Bytes of this process: STATUS's, and `pss`, where pages shared with others count in part."""
    found = {}
    for source in ("status", "smaps_rollup"):
        for line in Path("/proc/self", source).read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[name] = int(value.split()[0]) * 1024
    return {**{name: found[key] for name, key in STATUS.items()}, "pss": found["Pss"]}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def prepare(loader: str, path: Path, peer: Path | None) -> Callable[[], Any]:
    """What loads `path` with this loader, everything imported."""
    core = importlib.import_module("comfy.sd")
    if loader == "core":
        return lambda: core.load_diffusion_model(str(path))
    if loader == "snug":
        snug = importlib.import_module("snug.nodes.adapter.loading")
        return lambda: snug.load_diffusion_model(str(path))
    assert peer is not None
    node = load_peer(peer, path.parent)
    return lambda: node.load_unet(path.name)[0]


def measure(loader: str, path: Path, peer: Path | None) -> dict[str, Any]:
    """Load and use a model in this process: seconds, and memory above the baseline in bytes."""
    load = prepare(loader, path, peer)
    management = importlib.import_module("comfy.model_management")
    reset_peak()
    baseline = memory()

    def above() -> dict[str, int]:
        now = memory()
        return {"peak": now["peak"] - baseline["resident"]} | {
            name: now[name] - baseline[name] for name in ("resident", "anonymous", "file", "pss")
        }

    with torch.inference_mode():
        started = time.perf_counter()
        patcher = load()
        seconds = time.perf_counter() - started
        loaded = above()
        management.load_models_gpu([patcher], force_full_load=True)
        result = patcher.model.apply_model(**step_inputs(patcher.model, PIXELS, TEXT_TOKENS))
        used = above()
    if not result.isfinite().all():
        raise SystemExit(f"the step with {path.name} did not give finite numbers")
    return {"seconds": seconds, "baseline": baseline["resident"], "loaded": loaded, "used": used}


def measure_in_fresh_process(loader: str, path: Path, peer: Path | None) -> dict[str, Any]:
    words = [sys.executable, __file__, "--measure", loader, "--file", str(path)]
    words += ["--peer", str(peer)] if peer else []
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{loader} failed with {path.name}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_kind(kind: str, gib: float, folder: Path, peer: Path | None) -> list[dict[str, Any]]:
    """One record per loader that takes files of this kind."""
    path = folder / file_name(kind)
    model = make_file(path, kind, int(gib * (1 << 30)))
    size = path.stat().st_size
    loaders = ["snug"]
    loaders += ["core"] if kind in CORE_KINDS else []
    loaders += ["peer"] if kind in GGUF_KINDS and peer else []
    records = []
    for loader in loaders:
        print(f"{kind}: {loader}", file=sys.stderr, flush=True)
        record = measure_in_fresh_process(loader, path, peer)
        ratios = {f"{point}_ratio": record[point]["peak"] / size for point in ("loaded", "used")}
        records.append(
            {"kind": kind, "loader": loader, "model": model, "file_bytes": size, **ratios, **record}
        )
    path.unlink()
    return records


def as_markdown(records: list[dict[str, Any]], names: dict[str, str]) -> str:
    found = {(record["kind"], record["loader"]): record for record in records}
    loaders = [loader for loader in names if any(loader == key[1] for key in found)]
    header = ["file", "MiB"]
    header += [f"{names[loader]}: {column}" for loader in loaders for column in ("loaded", "used", "load s")]
    ratios, split = [], []
    for kind in dict.fromkeys(record["kind"] for record in records):
        row = [kind, f"{found[kind, 'snug']['file_bytes'] / MIB:.0f}"]
        for loader in loaders:
            record = found.get((kind, loader))
            row += (
                [f"{record['loaded_ratio']:.2f}", f"{record['used_ratio']:.2f}", f"{record['seconds']:.1f}"]
                if record
                else ["–"] * 3
            )
        ratios.append(row)
    for record in records:
        points = [record[point][what] / MIB for point in ("loaded", "used") for what in SPLIT]
        split.append([record["kind"], names[record["loader"]], *(f"{value:.0f}" for value in points)])
    columns = [f"{point}: {what}" for point in ("loaded", "used") for what in SPLIT]
    # A plain file goes to ComfyUI's own loader, whichever node opens it.
    ours = [record for record in records if record["loader"] == "snug" and record["kind"] != PLAIN]
    worst = max(ours, key=lambda record: record["used_ratio"], default=None)
    verdict = []
    if worst:
        held = "kept" if worst["used_ratio"] <= LIMIT else "exceeded"
        verdict = [
            f"Snug's highest of quantized files: {worst['used_ratio']:.3f} ({worst['kind']}); "
            f"the limit is {LIMIT:.2f}: {held}. A plain file ({PLAIN}) is loaded by ComfyUI in both columns.",
            "",
        ]
    return "\n".join(
        [
            "Peak resident memory above the baseline / file size:",
            "",
            table(header, ratios),
            "",
            *verdict,
            "MiB above the baseline after loading and after the step:",
            "",
            table(["file", "loader", *columns], split),
            "",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of each file in GiB")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--peer", type=Path, help="folder of a ComfyUI-GGUF checkout")
    parser.add_argument("--peer-name", default="ComfyUI-GGUF", help="what the report calls the peer")
    parser.add_argument("--files", type=Path, help="where the temporary folder is made")
    parser.add_argument("--measure", choices=("snug", "core", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    add_output_arguments(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    command = command_line(peer="ComfyUI-GGUF", files=None)
    comfyui = os.environ.get("SNUG_COMFYUI_PATH")
    if not comfyui:
        raise SystemExit(
            'SNUG_COMFYUI_PATH is not set: export what "scripts/bootstrap.py --print-env" prints'
        )
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this benchmark reads the memory of a process as Linux tells it")
    peer = options.peer.resolve() if options.peer else None
    use_comfyui(comfyui)
    register_snug()
    if options.measure:
        print(json.dumps(measure(options.measure, options.file, peer)))
        return

    facts = environment("comfy-kitchen", "gguf", "bitsandbytes", "safetensors")
    facts["ComfyUI"] = importlib.import_module("comfyui_version").__version__
    facts["model"] = "Flux, hidden size 3072, as many blocks as the size asks for"
    text = heading(TITLE, command, facts)
    with tempfile.TemporaryDirectory(dir=options.files) as folder:
        records = [
            record for kind in options.kinds for record in measure_kind(kind, options.gib, Path(folder), peer)
        ]
    text += "\n" + as_markdown(records, {"snug": "Snug", "core": "ComfyUI", "peer": options.peer_name})
    print(text)
    save(options, text, {"command": command, "environment": facts, "limit": LIMIT, "records": records})


if __name__ == "__main__":
    main()
