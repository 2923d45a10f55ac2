"""`snug quantize IN OUT --to TARGET`: a smaller file of the same model."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats.scaled_base import FLOATS
from ..memory.plan import size_text
from ..quantization import LayerInfo, Recipe, find_target, make_recipe, product_targets, targets
from ..quantization.automatic import automatic_mix
from ..quantization.calibration import LayerStatistics, load_calibration
from ..writers.plan import plan_tensors
from .console import note, progress
from .opening import OpenModel, Weight, check_target, decoded, open_model, spilled
from .text_encoders import add_tokenizer_option
from .writing import (
    GGUF,
    check_container,
    check_encoder,
    container,
    holds,
    source_description,
    write_model,
)

GB = 2**30


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "quantize",
        help="write a smaller file of the same model",
        description=(
            "Quantizes a diffusion model or text encoder, one tensor at a time: the model is never whole in memory. "
            "OUT is a .gguf file for GGUF targets and a .safetensors file for all others; it appears under its name "
            "only when it is complete."
        ),
        epilog="targets: "
        + ", ".join(
            name for name, target in {**targets(), **product_targets()}.items() if not target.unavailable
        ),
    )
    parser.add_argument("input", metavar="IN", help="a .gguf or .safetensors file, or a folder of diffusers")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--to", required=True, metavar="TARGET", help='what to quantize to, such as "GGUF Q4_K_M"'
    )
    parser.add_argument(
        "--skip",
        default="default",
        metavar="PATTERNS",
        help="layers that keep their precision: regular expressions between commas, found in their names; 'default' "
        "stands for the delicate layers of the model's architecture (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="what Calibrate (Snug) has saved: which input channels matter; static targets need it",
    )
    parser.add_argument(
        "--fit",
        type=float,
        metavar="GB",
        help="bring the weights to this size (in GB of 1024 MB) with a mix of the target's family of formats: layers "
        "that suffer most keep more bits",
    )
    add_tokenizer_option(parser)
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="take a file that is quantized already, which adds a rounding",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where to calculate, such as cuda; weights go there one at a time (default: cpu)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when it exists")
    return parser


def run(options: argparse.Namespace) -> int:
    model = open_model(options.input)
    target = check_target(options.output, options.input, options.overwrite)
    device = _device(options.device)
    check_container(target, find_target(options.to))
    encoder = check_encoder(target, model, options.input, options.tokenizer)
    layers = model.layers(gguf=container(target) == GGUF)
    statistics = _statistics(model, layers, options.calibration)
    recipe = make_recipe(
        options.to,
        layers,
        list(model.tensors),
        skip=options.skip,
        is_text_encoder=model.is_text_encoder,
        importance={name: found.mean_square for name, found in statistics.items()},
        statistics=statistics,
    )
    _refuse_quantized(model, recipe, layers, options)
    if options.fit:
        sensitivity = load_calibration(Path(options.calibration)).sensitivity if options.calibration else {}
        recipe = _fitted(model, recipe, layers, int(options.fit * GB), device, sensitivity)
    tensors, formats = _quantized(model, recipe, layers, device, target)
    if not formats:
        raise SnugError(
            f"No layer of {options.input} is quantized to {recipe.target.name} with these exclusions; choose another "
            f"target or a smaller size, or exclude fewer layers."
        )
    provenance = {"sources": [source_description(options.input)], "recipes": [recipe.describe()]}
    write_model(target, tensors, model, provenance, recipe.target.backend, encoder)
    counts = ", ".join(f"{count} in {name}" for name, count in formats.most_common())
    note(f"{target}: {size_text(target.stat().st_size)}; {formats.total()} layers quantized ({counts})")
    return 0


def _quantized(
    model: OpenModel, recipe: Recipe, layers: list[LayerInfo], device: torch.device, target: Path
) -> tuple[dict[str, Weight], Counter[str]]:
    """(all tensors of the model, how many layers got which format)"""
    formats: Counter[str] = Counter()
    tensors: dict[str, Weight] = {}
    named = {f"{layer.name}.weight": layer for layer in layers}
    total, done = sum(value.nbytes for value in model.tensors.values()), 0
    with progress("quantizing", "B") as update:
        for name, value in model.tensors.items():
            update(done, total)
            layer = named.get(name)
            packed = None
            if layer is not None and recipe.format_for(layer) is not None:
                packed = recipe.quantize(layer, _matrix(value, layer, device))
            if packed is not None:
                formats[packed.format.name] += 1
                # In a GGUF file some matrices have another shape than in the model.
                packed = PackedTensor(packed.data, packed.format, tuple(value.shape), packed.parts)
                tensors[name] = spilled(packed, target.parent)
            elif isinstance(value, PackedTensor) and not holds(target, value):
                tensors[name] = spilled(decoded(value, torch.bfloat16), target.parent)
            else:
                tensors[name] = value
            done += value.nbytes
    return tensors, formats


def _matrix(value: Weight, layer: LayerInfo, device: torch.device) -> torch.Tensor:
    """The weight as libraries are given it: in its own dtype, by which some of them choose that of the scales."""
    is_plain = isinstance(value, torch.Tensor) and value.dtype in FLOATS
    return (value if is_plain else decoded(value)).to(device).reshape(layer.shape)  # type: ignore[union-attr]


def _fitted(
    model: OpenModel,
    recipe: Recipe,
    layers: list[LayerInfo],
    budget: int,
    device: torch.device,
    sensitivity: dict[str, float],
) -> Recipe:
    """The recipe with the mix of formats that brings the model to this many bytes."""
    own = {f"{layer.name}.weight" for layer in layers}
    others = {name: value for name, value in model.tensors.items() if name not in own}
    if recipe.target.backend == "gguf":
        other_bytes = sum(planned.nbytes for planned in plan_tensors(others, None, model.rules))
    else:
        other_bytes = sum(value.nbytes for value in others.values())
    with progress("choosing formats", "layers") as update:
        mix = automatic_mix(
            recipe,
            layers,
            lambda layer: _matrix(model.tensors[f"{layer.name}.weight"], layer, device),
            budget,
            other_bytes=other_bytes,
            sensitivity=sensitivity,
            progress=update,
        )
    note(mix.report())
    return replace(recipe, overrides=mix.overrides)


def _statistics(model: OpenModel, layers: list[LayerInfo], path: str | None) -> dict[str, LayerStatistics]:
    """What a calibration file says of the layers that have the shape of the model's."""
    if not path:
        return {}
    found = load_calibration(Path(path)).layers
    known = {layer.name: layer for layer in layers}
    if not known.keys() & found.keys():
        raise SnugError(f"{path} has none of this model's layers; it was recorded with another model.")
    return {
        name: statistics
        for name, statistics in found.items()
        if name in known and known[name].shape == tuple(model.tensors[f"{name}.weight"].shape)
    }


def _refuse_quantized(
    model: OpenModel, recipe: Recipe, layers: list[LayerInfo], options: argparse.Namespace
) -> None:
    if options.requantize:
        return
    packed = [
        layer.name
        for layer in layers
        if isinstance(model.tensors[f"{layer.name}.weight"], PackedTensor)
        and recipe.format_for(layer) is not None
    ]
    if packed:
        raise SnugError(
            f"{options.input} is quantized already ({len(packed)} layers, such as {packed[0]}); start from the "
            f"original model, or pass --requantize to quantize it again, which adds one rounding to the other."
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise SnugError(
            f"There is no device {name!r} to calculate on here ({reason}); leave --device out."
        ) from error
    return device
