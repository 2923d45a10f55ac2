"""A Flux with random weights in the real ComfyUI, as it is and in other forms: what the Flux benchmarks measure.

The layers have the shapes of Flux.1-dev (hidden size 3072, 24 heads of 128) or, for a CPU, of a narrower one. Weights
are random numbers of a usual size: memory and time do not depend on them, beyond that a product of zeros is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from narrow import accept_narrow_models
from report import add_output_arguments, command_line, environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from snug_path import register_snug
from tiny import FAMILIES, use_comfyui
from tiny.build import parameter_shapes

HEAD = 128
CONTEXT, POOLED = 4096, 768
# Blocks of the real model.
DOUBLE, SINGLE = 19, 38


@dataclasses.dataclass(frozen=True)
class Size:
    """hidden: width; double, single: how many blocks; pixels: side of the square image; text: tokens of the prompt."""

    hidden: int
    double: int
    single: int
    pixels: int
    text: int

    @property
    def tokens(self) -> int:
        return (self.pixels // 16) ** 2 + self.text

    def __str__(self) -> str:
        return (
            f"hidden size {self.hidden}, {self.double} double and {self.single} single blocks, "
            f"{self.pixels} x {self.pixels} pixels, {self.tokens} tokens"
        )


FULL = Size(3072, 2, 4, 1024, 512)
REDUCED = Size(1024, 2, 2, 256, 64)


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--comfyui", default=os.environ.get("SNUG_COMFYUI_PATH"), help="folder of ComfyUI")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for field in dataclasses.fields(Size):
        note = f"default: {getattr(FULL, field.name)} on a GPU, {getattr(REDUCED, field.name)} on a CPU"
        parser.add_argument(f"--{field.name}", type=int, help=note)
    parser.add_argument("--rounds", type=int, help="default: 20 on a GPU, 3 on a CPU")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a script was asked for: its arguments, the command without paths of this machine, where and what to measure,
    and the facts for the head of its report."""

    options: argparse.Namespace
    command: str
    device: torch.device
    size: Size
    facts: dict[str, str]


def begin(parser: argparse.ArgumentParser, vram: str = "--highvram", **paths: str | None) -> Run:
    """Reads the command line, which gets the arguments of sizes and outputs besides, and starts ComfyUI.

    vram: ComfyUI's mode on a GPU; in that of high VRAM unloaded weights stay there. paths: as `report.command_line`
    takes them.
    """
    add_size_arguments(parser)
    add_output_arguments(parser)
    options = parser.parse_args()
    command = command_line(comfyui=None, **paths)
    device, size = start(options, vram)
    version = importlib.import_module("comfyui_version").__version__
    facts = {**environment("comfy-kitchen"), "ComfyUI": version, "model": str(size)}
    return Run(options, command, device, size, facts)


def start(options: argparse.Namespace, vram: str) -> tuple[torch.device, Size]:
    """Makes ComfyUI importable and returns where and what to measure; fills options.rounds in."""
    if not options.comfyui:
        raise SystemExit(
            '--comfyui or SNUG_COMFYUI_PATH is needed: export what "scripts/bootstrap.py --print-env" prints'
        )
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    use_comfyui(options.comfyui, vram if cuda else "--cpu")
    register_snug()
    options.rounds = options.rounds or (20 if cuda else 3)
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Size)}
    given = {name: value for name, value in fields.items() if value is not None}
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    size = dataclasses.replace(FULL if cuda else REDUCED, **given)
    if size.hidden != FULL.hidden:
        accept_narrow_models()
    return device, size


def flux_config(size: Size) -> dict[str, Any]:
    """What ComfyUI builds a Flux of this size from."""
    return {
        **FAMILIES["flux"].config,
        "hidden_size": size.hidden,
        "num_heads": size.hidden // HEAD,
        "context_in_dim": CONTEXT,
        "depth": size.double,
        "depth_single_blocks": size.single,
    }


def random_weights(size: Size, device: torch.device) -> dict[str, torch.Tensor]:
    """The file's tensors by name, bfloat16, made on `device` and handed over in the host's memory."""
    flux = dataclasses.replace(FAMILIES["flux"], config=flux_config(size))
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, shape in parameter_shapes(flux).items():
        values = torch.randn(shape, generator=generator, device=device)
        if len(shape) > 1:
            values /= shape[-1] ** 0.5
        elif name.endswith((".weight", ".scale")):
            values = values / 10 + 1
        else:
            values /= 5
        tensors[name] = values.bfloat16().cpu()
    return tensors


def dense_model(weights: dict[str, torch.Tensor]) -> Any:
    """ComfyUI's own MODEL of these weights; it may keep them."""
    patcher = importlib.import_module("comfy.sd").load_diffusion_model_state_dict(dict(weights))
    if patcher is None:
        raise SystemExit("ComfyUI does not take the random weights for a Flux")
    return patcher


def quantized(patcher: Any, target: str) -> Any:
    """A MODEL beside `patcher`, quantized by Snug to a target's name."""
    adapter = importlib.import_module("snug.nodes.adapter.quantizing")
    return adapter.quantize_model(patcher, adapter.QuantizeSettings(target))[0]


def compiled(patcher: Any) -> Any:
    adapter = importlib.import_module("snug.nodes.adapter.compilation")
    return adapter.compile_model(patcher, adapter.CompileSettings())


class NoRoomError(Exception):
    """The device's memory does not hold what was to be measured."""


def load(*patchers: Any) -> None:
    """Puts all of them on the device whole; raises NoRoomError where they do not fit."""
    management = importlib.import_module("comfy.model_management")
    management.load_models_gpu(list(patchers), force_full_load=True)
    for patcher in patchers:
        on_gpu = patcher.load_device.type != "cpu"
        if on_gpu and patcher.loaded_size() < patcher.model_size():
            raise NoRoomError("the device's memory does not hold it; choose fewer blocks")


Made = TypeVar("Made")


def attempt(name: str, make: Callable[[], Made]) -> Made | None:
    """What `make` returns; None, and a line for the reader, where this machine or library cannot."""
    try:
        return make()
    except Exception as error:  # whatever a library raises for hardware that it does not know
        reason = (str(error).splitlines() or [""])[0][:150]
        print(f"left out: {name}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
    free_memory()  # what the traceback kept
    return None


def free_memory() -> None:
    """Gives back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def blocks(model: Any) -> dict[str, list[torch.nn.Module]]:
    """The repeated blocks of a ComfyUI model, to be timed by themselves."""
    network = model.diffusion_model
    return {"double": list(network.double_blocks), "single": list(network.single_blocks)}


def step_of_full_model(double: float, single: float) -> float:
    """Seconds of the blocks of a whole Flux from those of one of each."""
    return DOUBLE * double + SINGLE * single


def caller(patcher: Any, size: Size, model: Any = None) -> Callable[[], torch.Tensor]:
    """What does one denoising step of a loaded MODEL, always with the same random inputs.

    model: a module to call in place of the patcher's own.
    """
    model = patcher.model if model is None else model
    device, generator = patcher.load_device, torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    side = size.pixels // 8
    sigma = torch.full((1,), 0.5, device=device)
    transformer_options = {
        **patcher.model_options["transformer_options"],
        "wrappers": patcher.wrappers,
        "sigmas": sigma,
        "sample_sigmas": sigma,
        "cond_or_uncond": [0],
        "uuids": [object()],
    }
    inputs = {
        "x": random(1, model.latent_format.latent_channels, side, side),
        "t": sigma,
        "c_crossattn": random(1, size.text, CONTEXT),
        "y": random(1, POOLED),
        "guidance": torch.full((1,), 3.5, device=device),
    }

    def call() -> torch.Tensor:
        with torch.inference_mode():  # as ComfyUI runs every node
            return model.apply_model(**inputs, transformer_options=dict(transformer_options))

    return call
