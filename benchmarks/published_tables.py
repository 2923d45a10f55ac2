"""The tables that others have published, with Snug's figures beside them: memory, and on a GPU time and peak.

    python benchmarks/published_tables.py --markdown benchmarks/results/published-tables.md \
        --json benchmarks/results/published-tables.json

Needs a ComfyUI in $SNUG_COMFYUI_PATH. Memory after loading is computed from the shapes of the real models: what each
layer takes in the format that Quantize Model (Snug) gives it, scales included, and what stays as it is; nothing is
downloaded and no weight is made. CLIP and VAE count with their published sizes. On a CUDA device a Flux.1-dev with
random weights is sampled as well (--steps): seconds, and peak: what the transformer needs beyond its weights, added to
the memory after loading. Quality depends on the weights and is not shown. The published memory of Flux and PixArt is in
GiB, as the first row of each shows, that of SDXL in GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flux_model import (
    DOUBLE,
    FULL,
    SINGLE,
    attempt,
    begin,
    caller,
    compiled,
    dense_model,
    flux_config,
    free_memory,
    load,
    quantized,
    random_weights,
)
from published import FLUX, FLUX_SOURCE, PIXART, PIXART_SOURCE, SDXL, SDXL_SOURCE, Published
from report import heading, save, table
from timing import peak_growth, synchronize

GB, GIB = 1e9, 2**30
CLIP_L, CLIP_G, VAE = int(0.246 * GB), int(1.4 * GB), int(0.168 * GB)
SDXL_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "num_head_channels": 64,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
# Rows that are sampled before the others.
FIRST = ("bitsandbytes 4-bit NF4", "GGUF Q8_0", "torchao float8 weight-only", "torchao int8 weight-only")
PIXART_CONFIG = {"input_size": 128, "pe_interpolation": 2, "model_max_length": 300, "micro_condition": False}


def network(module: str, name: str, **config: Any) -> torch.nn.Module:
    """A model of ComfyUI without memory for its weights."""
    operations = importlib.import_module("comfy.ops").disable_weight_init
    made = getattr(importlib.import_module(module), name)
    return made(**config, dtype=torch.bfloat16, device="meta", operations=operations)


def flux_transformer() -> torch.nn.Module:
    size = dataclasses.replace(FULL, double=DOUBLE, single=SINGLE)
    known = dataclasses.fields(importlib.import_module("comfy.ldm.flux.model").FluxParams)
    names = {field.name for field in known}
    config = {name: value for name, value in flux_config(size).items() if name in names}
    return network("comfy.ldm.flux.model", "Flux", **config)


def t5_xxl() -> torch.nn.Module:
    folder = Path(importlib.import_module("comfy.text_encoders.t5").__file__ or "").parent
    config = json.loads((folder / "t5_config_xxl.json").read_text())
    return network("comfy.text_encoders.t5", "T5", config_dict=config)


def stored_bytes(model: torch.nn.Module, target: str | None, is_text_encoder: bool, itemsize: int = 2) -> int:
    """What the model's weights take when it is quantized to a target; None: all of them in 16 bits."""
    quantization = importlib.import_module("snug.quant_backends.quantization")
    packed_bytes = importlib.import_module("snug.quant_backends.quantization.automatic").packed_bytes
    linear = {
        name: quantization.LayerInfo(name, tuple(layer.weight.shape))
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    total = itemsize * sum(parameter.numel() for parameter in model.parameters())
    if target is None:
        return total
    names = [name for name, _ in model.named_parameters()]
    recipe = quantization.make_recipe(target, list(linear.values()), names, is_text_encoder=is_text_encoder)
    for layer in linear.values():
        fmt = recipe.format_for(layer)
        if fmt is not None:
            total += packed_bytes(recipe.target, fmt, layer.shape) - itemsize * layer.weights
    return total


def loaded_bytes(
    rows: Sequence[Published], model: torch.nn.Module, encoder: torch.nn.Module | None, others: int
) -> list[int]:
    """Of each row: model, encoder and the others together."""
    sizes = []
    for row in rows:
        size = others + stored_bytes(model, row.target, False)
        if encoder is not None:
            size += stored_bytes(encoder, row.target if row.encoder == "same" else row.encoder, True)
        sizes.append(size)
    return sizes


def sampled(
    row: Published, dense: Any, steps: int, call_of: Callable[[Any], Callable[[], Any]], device: torch.device
) -> dict[str, float]:
    """Seconds of so many steps, of the first one beyond the others' (compiling), and bytes beyond the weights."""
    patcher = dense if row.target is None else quantized(dense, row.target)
    patcher = compiled(patcher) if row.is_compiled else patcher
    load(patcher)
    call = call_of(patcher)
    started = time.perf_counter()
    call()
    synchronize(device)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(steps):
        call()
    synchronize(device)
    seconds = time.perf_counter() - started
    growth = peak_growth(call, device)
    patcher.detach()
    return {"seconds": seconds, "compile": max(0.0, first - seconds / steps), "growth": growth or 0}


def section(
    title: str,
    source: str,
    rows: Sequence[Published],
    sizes: Sequence[int],
    measured: Mapping[str, Any],
    unit: float = GIB,
) -> str:
    name = "GiB" if unit == GIB else "GB"
    header = ["", f"published {name}", f"Snug {name}", "published peak", "Snug peak", "published s", "Snug s"]
    header += ["published compile s", "Snug compile s"]

    def cell(value: float | None, digits: int = 3) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    lines = []
    for row, size in zip(rows, sizes, strict=True):
        found = measured.get(row.name)
        lines.append(
            [
                row.name,
                cell(row.loaded),
                cell(size / unit),
                cell(row.peak),
                cell((size + found["growth"]) / unit if found else None),
                cell(row.seconds, 1),
                cell(found["seconds"] if found else None, 1),
                cell(row.compile_seconds, 0),
                cell(found["compile"] if found and row.is_compiled else None, 0),
            ]
        )
    return f"\n### {title}\n\nPublished: {source}.\n\n{table(header, lines)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50, help="of sampling, on a GPU")
    run = begin(parser, "--normalvram")  # so that what has been measured leaves the GPU
    options, command, device = run.options, run.command, run.device
    facts = {name: fact for name, fact in run.facts.items() if name != "model"}  # there are several
    encoder = t5_xxl()
    flux = flux_transformer()
    pixart = network("comfy.ldm.pixart.pixartms", "PixArtMS", **PIXART_CONFIG)
    unet = network("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel", **SDXL_CONFIG)
    sizes = {
        "flux": loaded_bytes(FLUX, flux, encoder, CLIP_L + VAE),
        "pixart": loaded_bytes(PIXART, pixart, encoder, VAE),
        "sdxl": loaded_bytes(SDXL, unet, None, CLIP_L + CLIP_G + VAE),
    }
    measured: dict[str, dict[str, float]] = {}

    def write() -> str:
        text = heading("Published tables", command, facts)
        text += section("Flux.1-dev", FLUX_SOURCE, FLUX, sizes["flux"], measured)
        text += section("PixArt-Sigma", PIXART_SOURCE, PIXART, sizes["pixart"], {})
        text += section("Stable Diffusion XL", SDXL_SOURCE, SDXL, sizes["sdxl"], {}, GB)
        figures = {
            name: [
                {**dataclasses.asdict(row), "snug_bytes": count, **measured.get(row.name, {})}
                for row, count in zip(rows, sizes[name], strict=True)
            ]
            for name, rows in (("flux", FLUX), ("pixart", PIXART), ("sdxl", SDXL))
        }
        save(options, text, {"command": command, "environment": facts, "tables": figures})
        return text

    text = write()
    if device.type == "cuda":
        whole = dataclasses.replace(FULL, double=DOUBLE, single=SINGLE)
        facts["sampled"] = f"{whole}, {options.steps} steps"
        dense = dense_model(random_weights(whole, device))
        for row in sorted(FLUX, key=lambda row: row.name not in FIRST):
            found = attempt(
                row.name,
                lambda row=row: sampled(row, dense, options.steps, lambda p: caller(p, whole), device),
            )
            free_memory()
            if found is not None:
                measured[row.name] = found
                print(row.name, found, flush=True)
                text = write()
    print(text)


if __name__ == "__main__":
    main()
