"""The nodes of combinations.FEATURES in workflows, and the dense file that their result has to equal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from combinations import rounded
from safetensors.torch import load_file, save_file
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.readers import load_diffusion_gguf
from snug.quant_backends.readers.conventions import open_quantized_safetensors
from workflows import Workflow

Node = tuple[str, dict[str, Any]]

LORA = "features.safetensors"
CASTING = {"compute_dtype": "auto", "skip_patterns": ""}
COMPILE = {"mode": "default", "scope": "regional (repeated blocks)", "fallback_to_eager": False}
OFFLOAD = {"limit_gb": 0.0, "pin_memory": True, "offload_to": "CPU memory"}
# Of each feature two settings.
NODES: dict[str, tuple[Node, Node]] = {
    "casting": (
        ("SnugLayerwiseCasting", {**CASTING, "storage_dtype": "float8_e4m3fn"}),
        ("SnugLayerwiseCasting", {**CASTING, "storage_dtype": "float8_e5m2"}),
    ),
    "offload": (
        ("SnugGroupOffload", {**OFFLOAD, "level": "blocks", "blocks_per_group": 1, "prefetch": "auto"}),
        ("SnugGroupOffload", {**OFFLOAD, "level": "single layers", "blocks_per_group": 3, "prefetch": "2"}),
    ),
    "compile": (
        ("SnugTorchCompile", {**COMPILE, "backend": "aot_eager", "fullgraph": True, "dynamic": "auto"}),
        ("SnugTorchCompile", {**COMPILE, "backend": "eager", "fullgraph": False, "dynamic": "on"}),
    ),
    "lora": (
        ("LoraLoaderModelOnly", {"lora_name": LORA, "strength_model": 0.8}),
        ("LoraLoaderModelOnly", {"lora_name": LORA, "strength_model": -0.5}),
    ),
}


def add_features(workflow: Workflow, features: Iterable[str], setting: int = 0) -> Workflow:
    """The workflow with the nodes of `features`, in this order, in front of its sampler."""
    sampler = workflow["sampler"]["inputs"]
    for name in features:
        class_type, inputs = NODES[name][setting]
        workflow[name] = {"class_type": class_type, "inputs": {"model": sampler["model"], **inputs}}
        sampler["model"] = [name, 0]
    return workflow


def add_sampler(workflow: Workflow, other: Workflow, suffix: str) -> None:
    """Adds what the sampler of `other` needs to `workflow`, which has the same loader: everything under names with
    `suffix`, so that its latent is outputs["save" + suffix].
    """
    for name, node in other.items():
        if name == "model":
            continue
        inputs = {
            key: [value[0] + suffix, value[1]] if isinstance(value, list) and value[0] != "model" else value
            for key, value in node["inputs"].items()
        }
        workflow[name + suffix] = {**node, "inputs": inputs}


def write_rounded(file: Path, dense: Path, path: Path) -> None:
    """Writes the dense twin of `file` with those weights rounded that the first setting of casting rounds."""
    quantized = {name for name, tensor in _tensors(file).items() if _is_quantized(tensor)}
    storage = NODES["casting"][0][1]["storage_dtype"]
    tensors = {
        name: rounded(tensor, storage)
        if name.endswith(".weight") and tensor.dim() > 1 and name not in quantized
        else tensor
        for name, tensor in load_file(dense).items()
    }
    save_file(tensors, path)


def _tensors(file: Path) -> dict[str, Any]:
    if file.suffix == ".gguf":
        return load_diffusion_gguf(file).state_dict
    return open_quantized_safetensors(file).state_dict


def _is_quantized(tensor: PackedTensor | torch.Tensor) -> bool:
    return isinstance(tensor, PackedTensor) and getattr(tensor.format, "dtype", None) is None
