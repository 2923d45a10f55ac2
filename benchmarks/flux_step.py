"""One denoising step of a Flux on the CPU in the real ComfyUI: dense, through Snug and, if given, a peer pack.

    python benchmarks/flux_step.py --peer path/to/ComfyUI-GGUF \
        --markdown benchmarks/results/flux-step-cpu.md --json benchmarks/results/flux-step-cpu.json

Run it with the Python that ComfyUI runs with, and SNUG_COMFYUI_PATH set (`scripts/bootstrap.py --print-env`).

The model has Flux's real layers (hidden size 3072, 24 heads of 128, context 4096) but few blocks, and random weights;
its files are made once and kept. Measured is one `apply_model` call (what a sampler does per step) with the
pack's own loader, in float32 as ComfyUI computes on a CPU. Each round runs every contender once, in turn, and the
median over the rounds counts, or the best one (--statistic best). Beside the time is that of the processor, all threads
together, which other processes of the machine hardly change. Where libgguf is installed, Snug decodes with it, and a
second time with torch alone. The error is the relative difference of the result from the dense model's: that of
the quantization, if the pack decodes rightly. Memory is the weights' as ComfyUI accounts for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle workers must not take the other contenders' time

import torch
from report import add_output_arguments, command_line, environment, heading, save, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from bootstrap import cache_folder
from native_quantizer import native_quantizer
from safetensors.torch import load_file, save_file
from snug_path import register_snug
from tiny import FAMILIES, use_comfyui
from tiny.build import parameter_shapes
from tiny.weights import random_parameter

TITLE = "One Flux step on the CPU"
SIZES = {"hidden_size": 3072, "num_heads": 24, "context_in_dim": 4096}
POOLED_WIDTH = 768
STATISTICS = {"median": statistics.median, "best": min}
COLUMNS = (("seconds", 3), ("ratio", 2), ("processor_ratio", 2))  # each with its digits
SNUG, TORCH, PEER = "snug", "torch alone", "peer"


def make_dense_file(path: Path, double: int, single: int) -> None:
    """A Flux of so many blocks with random weights, bfloat16 as Flux is published."""
    flux = FAMILIES["flux"]
    config = {**flux.config, **SIZES, "depth": double, "depth_single_blocks": single}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: random_parameter(name, shape, generator).bfloat16()
        for name, shape in parameter_shapes(dataclasses.replace(flux, config=config)).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def make_files(folder: Path, double: int, single: int, formats: Sequence[str]) -> dict[str, Path]:
    """The dense file and one GGUF file for each format, made where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"flux-{double}-{single}"
    files = {"dense": folder / f"{stem}.safetensors"}
    files |= {name: folder / f"{stem}-{name}.gguf" for name in formats}
    if not files["dense"].exists():
        print(f"writing {files['dense']}", flush=True)
        make_dense_file(files["dense"], double, single)
    writers = importlib.import_module("snug.quant_backends.writers")
    for name in formats:
        if not files[name].exists():
            print(f"writing {files[name]}", flush=True)
            writers.write_gguf(files[name], load_file(files["dense"]), name, quantizer=native_quantizer)
    return files


def load_peer(checkout: Path, folder: Path) -> Any:
    """The loader node of a ComfyUI-GGUF checkout, which finds its models in `folder`."""
    importlib.import_module("folder_paths").add_model_folder_path("diffusion_models", str(folder))
    spec = importlib.util.spec_from_file_location(
        "peer_pack", checkout / "__init__.py", submodule_search_locations=[str(checkout)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"{checkout} is no node pack; give the folder of a ComfyUI-GGUF checkout")
    sys.modules["peer_pack"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()


def load_models(files: dict[str, Path], peer: Any) -> dict[tuple[str, str], Any]:
    """Model patchers by (loader, format); the dense one first."""
    core = importlib.import_module("comfy.sd")
    management = importlib.import_module("comfy.model_management")
    snug = importlib.import_module("snug.nodes.adapter.loading")
    native = importlib.import_module("snug.quant_backends.kernels.native")
    models = {}
    for name, path in files.items():
        if name == "dense":
            models["dense", name] = core.load_diffusion_model(str(path))
            continue
        models[SNUG, name] = snug.load_diffusion_model(str(path))
        if native.unavailable() is None:
            models[TORCH, name] = models[SNUG, name]
        if peer is not None:
            models[PEER, name] = peer.load_unet(path.name)[0]
    management.load_models_gpu(list(models.values()), force_full_load=True)
    return models


def step_inputs(model: Any, pixels: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """Random arguments of `apply_model` for a square image of `pixels` (16 x 16 of them are one token)."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(
            1, model.latent_format.latent_channels, pixels // 8, pixels // 8, generator=generator
        ),
        "t": torch.full((1,), 0.5),
        "c_crossattn": torch.randn(1, text_tokens, SIZES["context_in_dim"], generator=generator),
        "y": torch.randn(1, POOLED_WIDTH, generator=generator),
        "guidance": torch.full((1,), 3.5),
    }


def measure(
    models: dict[tuple[str, str], Any], pixels: int, text_tokens: int, rounds: int, statistic: str
) -> list[dict[str, Any]]:
    """One record per model: seconds, ratio to dense, all times in order, relative error, memory."""
    torch_only = importlib.import_module("snug.quant_backends.kernels.native").torch_only
    inputs = step_inputs(models["dense", "dense"].model, pixels, text_tokens)
    results: dict[tuple[str, str], torch.Tensor] = {}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    processor: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    for _ in range(rounds):
        for key, patcher in models.items():
            with torch_only() if key[0] == TORCH else nullcontext():
                started, worked = time.perf_counter(), time.process_time()
                results[key] = patcher.model.apply_model(**inputs)
            times[key].append(time.perf_counter() - started)
            processor[key].append(time.process_time() - worked)
    reference = results["dense", "dense"]
    seconds = {key: STATISTICS[statistic](found) for key, found in times.items()}
    work = {key: STATISTICS[statistic](found) for key, found in processor.items()}
    return [
        {
            "loader": key[0],
            "format": key[1],
            "seconds": seconds[key],
            "ratio": seconds[key] / seconds["dense", "dense"],
            "processor_seconds": work[key],
            "processor_ratio": work[key] / work["dense", "dense"],
            "times": times[key],
            "processor_times": processor[key],
            "error": float((results[key] - reference).norm() / reference.norm()),
            "weight_bytes": patcher.model_size(),
        }
        for key, patcher in models.items()
    ]


def case_table(case: dict[str, Any]) -> str:
    """One measured case in Markdown: a row per format, Snug and the peer side by side."""
    records = {(record["loader"], record["format"]): record for record in case["records"]}
    loaders = [loader for loader in (SNUG, TORCH, PEER) if any(loader == key[0] for key in records)]
    header = ["format"]
    for loader in loaders:
        header += [f"{loader} {column}" for column in ("s/step", "/ dense", "processor / dense")]
    header += ["error", "MB"]
    rows = []
    for name in dict.fromkeys(key[1] for key in records if key[0] != "dense"):
        row = [name]
        for loader in loaders:
            record = records[loader, name]
            row += [f"{record[key]:.{digits}f}" for key, digits in COLUMNS]
        record = records[SNUG, name]
        row += [f"{record['error']:.2%}", f"{record['weight_bytes'] / 1e6:.0f}"]
        rows.append(row)
    dense = records["dense", "dense"]
    return "\n".join(
        [
            f"### {case['pixels']} x {case['pixels']} pixels, {case['text_tokens']} text tokens "
            f"({case['tokens']} tokens together)",
            "",
            f"Dense: {dense['seconds']:.3f} s per step ({dense['processor_seconds']:.3f} s of processor time), "
            f"{dense['weight_bytes'] / 1e6:.0f} MB.",
            "",
            table(header, rows),
        ]
    )


def parse_case(text: str) -> tuple[int, int]:
    """PIXELS:TEXT as two numbers."""
    pixels, _, text_tokens = text.partition(":")
    return int(pixels), int(text_tokens)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["Q8_0", "Q4_0", "Q4_K"], metavar="FORMAT")
    parser.add_argument("--double", type=int, default=1, help="double blocks (the real model has 19)")
    parser.add_argument("--single", type=int, default=2, help="single blocks (the real model has 38)")
    parser.add_argument(
        "--cases",
        type=parse_case,
        nargs="+",
        default=[(64, 32), (64, 512), (512, 512)],
        metavar="PIXELS:TEXT",
        help="side of the square image and tokens of the text; default: 64:32 64:512 512:512",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--statistic", default="median", choices=STATISTICS, help="of the rounds")
    parser.add_argument("--peer", type=Path, help="folder of a ComfyUI-GGUF checkout")
    parser.add_argument("--peer-name", default="ComfyUI-GGUF", help="what the report calls the peer")
    parser.add_argument("--files", type=Path, default=cache_folder() / "benchmarks", help="where models lie")
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
    use_comfyui(comfyui)
    register_snug()
    files = make_files(options.files, options.double, options.single, options.formats)
    peer = load_peer(options.peer.resolve(), options.files) if options.peer else None

    facts = environment("comfy-kitchen", "gguf", "libgguf")
    facts["ComfyUI"] = importlib.import_module("comfyui_version").__version__
    facts["threads"] = str(torch.get_num_threads())
    facts["model"] = f"Flux, hidden size 3072, {options.double} double and {options.single} single blocks"
    if peer is not None:
        facts["peer"] = options.peer_name
    cases = []
    text = heading(TITLE, command, facts)
    print(text)
    with torch.inference_mode():
        models = load_models(files, peer)
        measure(models, 16, 1, 1, options.statistic)  # the first use of each weight reads it from the file
        for pixels, text_tokens in options.cases:
            records = measure(models, pixels, text_tokens, options.rounds, options.statistic)
            tokens = (pixels // 16) ** 2 + text_tokens
            cases.append({"pixels": pixels, "text_tokens": text_tokens, "tokens": tokens, "records": records})
            print(case_table(cases[-1]) + "\n", flush=True)
            text += "\n" + case_table(cases[-1]) + "\n"
    save(options, text, {"command": command, "environment": facts, "cases": cases})


if __name__ == "__main__":
    main()
