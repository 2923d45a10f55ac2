"""Builds tiny diffusion models from ComfyUI's own classes, so that tensor names are the real ones."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from .families import FAMILIES, Family
from .weights import random_parameter


def use_comfyui(root: str | os.PathLike[str], option: str = "--cpu") -> None:
    """Makes `comfy` importable from the ComfyUI folder `root`, on the CPU, in this process.

    option: ComfyUI's start option in place of that for the CPU. It reads the command line while it is imported, hence
    the change of `sys.argv`.
    """
    sys.path.insert(0, os.fspath(root))
    sys.argv = [sys.argv[0], option]
    importlib.import_module("comfy.options").enable_args_parsing()


def published_name(name: str, family: Family) -> str:
    """The name that the family's published files use for ComfyUI's parameter `name`."""
    for old, new in family.renames:
        name = name.replace(old, new)
    return name


def parameter_shapes(family: Family) -> dict[str, torch.Size]:
    """Shapes of the family's parameters by published name; nothing is allocated."""
    module_name, _, class_name = family.model_class.partition(":")
    module = importlib.import_module(module_name)
    model_class = getattr(module, class_name)
    config = dict(family.config)
    if family.params_class is not None:
        known = {field.name for field in dataclasses.fields(getattr(module, family.params_class))}
        config = {name: value for name, value in config.items() if name in known}
    operations = importlib.import_module("comfy.ops").disable_weight_init
    device = torch.device("meta")
    # A few classes create parameters without naming a device; the context covers those.
    with device:
        model = model_class(**config, dtype=torch.float32, device=device, operations=operations)
    shapes = {published_name(name, family): tensor.shape for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name not in family.unused}


def make_tiny_model(family: str, path: str | os.PathLike[str], seed: int = 0) -> dict[str, torch.Size]:
    """Writes a diffusion model of `family` with random weights to the safetensors file `path`.

    The same seed gives the same file. Returns the shapes by tensor name. Needs ComfyUI on `sys.path`
    (see `use_comfyui`). Raises KeyError for an unknown family.
    """
    spec = FAMILIES[family]
    shapes = parameter_shapes(spec)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    tensors = {name: random_parameter(name, shapes[name], generator).to(dtype) for name in sorted(shapes)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, os.fspath(path), metadata={"format": "pt"})
    return shapes
