"""Quantized safetensors of every convention, told apart by their headers alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..core.packed import PackedTensor
from . import activation_keys, bitsandbytes_keys, fp8_keys, quanto_keys, torchao_keys
from .core_quant import LOADABLE, core_formats, has_core_formats, load_core_int8
from .key_groups import KeyGroups
from .mapped_file import writable
from .safetensors_file import SafetensorsFile

Loader = Callable[[KeyGroups], None]
OWN = "snug"

# Name, whether a file has it, what loads it. A file may have several; bitsandbytes comes first because its keys
# are the most particular.
KNOWN: tuple[tuple[str, Callable[[SafetensorsFile], bool], Loader], ...] = (
    ("bitsandbytes-4bit", bitsandbytes_keys.has_4bit, bitsandbytes_keys.load_4bit),
    ("bitsandbytes-int8", bitsandbytes_keys.has_int8, bitsandbytes_keys.load_int8),
    ("torchao", torchao_keys.has_torchao, torchao_keys.load_torchao),
    ("quanto", quanto_keys.has_quanto, quanto_keys.load_quanto),
    ("scaled-fp8", fp8_keys.has_scaled_fp8, fp8_keys.load_scaled_fp8),
)
# Ends of names that all occur together, what they are, why not, what instead.
REFUSED = (
    ((".qweight", ".wscales"), "SVDQuant (Nunchaku)", "its weights are packed for that engine's own kernels"),
    (
        (".qweight", ".proj_down"),
        "SVDQuant (Nunchaku)",
        "its weights are packed for that engine's own kernels",
    ),
    ((".qweight", ".g_idx"), "GPTQ", "its layouts differ by the tool that wrote them"),
    ((".qweight", ".qzeros"), "AWQ", "its layouts differ by the tool that wrote them"),
)
ALTERNATIVE = "load a GGUF, NF4 or FP8 version of the model"


@dataclass(frozen=True, slots=True)
class Convention:
    """name: of one convention or several joined by "+", "plain" when nothing is quantized, "core" when ComfyUI
    itself defines it (`comfy_quant`, `_quantization_metadata`), "snug" when such a file says of its layers what only
    Snug knows.
    loaders: what puts the weights together; a "core" file without any can be loaded by ComfyUI alone.
    core_formats: what ComfyUI calls the formats of a "core" file.
    """

    name: str
    loaders: tuple[Loader, ...] = ()
    core_formats: frozenset[str] = frozenset()

    @property
    def core(self) -> bool:
        return self.name == "core"


@dataclass(frozen=True, slots=True)
class LoadedSafetensors:
    """What a safetensors file holds.

    state_dict: model name to PackedTensor (quantized) or torch.Tensor, nearly all views of the file; for "plain" and
        "core" without loaders the tensors as they are.
    extras: scales of activations and markers, by their names in the file.
    format_counts: format name (of plain tensors safetensors' dtype) to number of tensors. metadata: the file's.
    """

    state_dict: dict[str, PackedTensor | torch.Tensor]
    convention: Convention
    format_counts: Mapping[str, int]
    metadata: Mapping[str, str]
    extras: Mapping[str, torch.Tensor]


def recognise(file: SafetensorsFile) -> Convention:
    """The convention of a file by its header; FileFormatError for one that Snug refuses."""
    if has_core_formats(file):
        formats = core_formats(file)
        loaders: tuple[Loader, ...] = (
            (load_core_int8, fp8_keys.load_scaled_fp8) if formats <= LOADABLE else ()
        )
        if loaders and activation_keys.has_activations(file):
            return Convention(OWN, (*loaders, activation_keys.load_activations))
        return Convention("core", loaders, formats)
    for endings, kind, reason in REFUSED:
        if all(any(name.endswith(ending) for name in file.tensors) for ending in endings):
            file.fail(f"the file is quantized with {kind}, which Snug does not load: {reason}", ALTERNATIVE)
    found = [(name, loader) for name, has, loader in KNOWN if has(file)]
    if not found:
        return Convention("plain")
    name, of_file = "+".join(name for name, _ in found), [loader for _, loader in found]
    if activation_keys.has_activations(file):
        of_file.append(activation_keys.load_activations)
    return Convention(name, tuple(of_file))


def open_quantized_safetensors(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> LoadedSafetensors:
    """Open a safetensors file and put its quantized weights together; nothing is decoded and hardly anything read.

    shapes: logical shapes known from elsewhere, for what does not say them itself (quanto's qint4 and qint2
    without a bias). Raises FileFormatError when the file is damaged, inconsistent or of a refused kind.
    """
    return load_quantized(SafetensorsFile(path), shapes)


def load_quantized(
    file: SafetensorsFile, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> LoadedSafetensors:
    """`open_quantized_safetensors` for a file whose header is already read."""
    convention = recognise(file)
    groups = KeyGroups(file, shapes or {})
    for load in convention.loaders:
        load(groups)
    packed = Counter(
        value.format.name for value in groups.state_dict.values() if isinstance(value, PackedTensor)
    )
    plain = Counter(file.tensors[name].dtype_name for name in groups.left)
    for name in [name for name in file.tensors if name in groups.left]:
        groups.state_dict[name] = writable(groups.take(name))
    return LoadedSafetensors(groups.state_dict, convention, packed + plain, file.metadata, groups.extras)
