"""Diffusion-model files of a wanted size for benchmarks: Flux's real layers, written piece by piece.

Weights repeat one random sample of a few million, encoded once: a file of any size takes little time and memory to
make, and no number in it is out of the ordinary. Quantized are the matrices of the blocks, as usual for Flux.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flux_step import SIZES
from native_quantizer import native_quantizer
from tiny import FAMILIES
from tiny.build import parameter_shapes
from tiny.weights import random_parameter

GGUF_KINDS = ("Q8_0", "Q4_K")
NF4_BLOCK = 64  # weights to a float32 scale
# Bytes per weight.
KINDS = {"Q8_0": 34 / 32, "Q4_K": 144 / 256, "nf4": 0.5 + 4 / NF4_BLOCK, "fp8": 1.0, "bf16": 2.0}
WIDTH = SIZES["hidden_size"]
SAMPLE = (2048, WIDTH)  # weights
# Matrices of a double and of a single block, in WIDTH x WIDTH.
DOUBLE_BLOCK, SINGLE_BLOCK = 36, 15
FP8_MAX = 448.0
SAFETENSORS_NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


def file_name(kind: str) -> str:
    return f"flux-{kind}{'.gguf' if kind in GGUF_KINDS else '.safetensors'}"


def make_file(path: Path, kind: str, nbytes: int) -> str:
    """Write a Flux of at least `nbytes` bytes in `kind` (a key of KINDS); returns what it is in words.

    Needs ComfyUI on `sys.path` and the pack registered.
    """
    double, single = _depth(nbytes / KINDS[kind])
    flux = FAMILIES["flux"]
    config = {**flux.config, **SIZES, "depth": double, "depth_single_blocks": single}
    shapes = parameter_shapes(dataclasses.replace(flux, config=config))
    sample = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0)) / math.sqrt(WIDTH)
    if kind in GGUF_KINDS:
        _write_gguf(path, kind, shapes, sample)
    else:
        _write_safetensors(path, _ENTRIES[kind](shapes, sample))
    return f"{double} double and {single} single blocks"


def _depth(weights: float) -> tuple[int, int]:
    """Double and single blocks, one to two as in the real model, that have at least so many weights."""
    matrices = weights / WIDTH**2
    double = max(1, int(matrices / (DOUBLE_BLOCK + 2 * SINGLE_BLOCK)))
    return double, max(1, math.ceil((matrices - DOUBLE_BLOCK * double) / SINGLE_BLOCK))


def _is_quantized(name: str, shape: torch.Size) -> bool:
    return len(shape) == 2 and name.startswith(("double_blocks.", "single_blocks."))


# ---- GGUF ------------------------------------------------------------------------------------------------------


class _Weights(Mapping[str, torch.Tensor]):
    """The model's weights, made when asked for; of those that will be quantized only the shape matters."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if _is_quantized(name, shape):
            return torch.zeros((), dtype=torch.bfloat16).expand(shape)
        return random_parameter(name, shape, torch.Generator().manual_seed(0)).bfloat16()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _write_gguf(path: Path, kind: str, shapes: Mapping[str, torch.Size], sample: torch.Tensor) -> None:
    packed = native_quantizer(sample, kind).view(-1)
    per_weight = packed.numel() / sample.numel()

    def from_sample(values: torch.Tensor, _name: str) -> torch.Tensor:
        nbytes = round(values.numel() * per_weight)
        return packed.repeat(-(-nbytes // packed.numel()))[:nbytes]

    importlib.import_module("snug.quant_backends.writers").write_gguf(
        path, _Weights(shapes), kind, quantizer=from_sample
    )


# ---- safetensors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file: `content` is repeated until `shape` is full."""

    shape: tuple[int, ...]
    content: torch.Tensor

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.content.dtype.itemsize


def _whole(tensor: torch.Tensor) -> _Entry:
    return _Entry(tuple(tensor.shape), tensor)


def _plain(name: str, shape: torch.Size) -> _Entry:
    return _whole(random_parameter(name, shape, torch.Generator().manual_seed(0)).bfloat16())


def _bf16(shapes: Mapping[str, torch.Size], sample: torch.Tensor) -> dict[str, _Entry]:
    values = sample.bfloat16()
    return {
        name: _Entry(tuple(shape), values) if _is_quantized(name, shape) else _plain(name, shape)
        for name, shape in shapes.items()
    }


def _fp8(shapes: Mapping[str, torch.Size], sample: torch.Tensor) -> dict[str, _Entry]:
    """ComfyUI's first form of scaled FP8: a scale per matrix, and a marker for the whole file."""
    scale = sample.abs().max().view(1) / FP8_MAX
    values = (sample / scale).to(torch.float8_e4m3fn)
    entries = {"scaled_fp8": _whole(values.view(-1)[:2])}
    for name, shape in shapes.items():
        if _is_quantized(name, shape):
            entries[name] = _Entry(tuple(shape), values)
            entries[name.removesuffix("weight") + "scale_weight"] = _whole(scale)
        else:
            entries[name] = _plain(name, shape)
    return entries


def _nf4(shapes: Mapping[str, torch.Size], sample: torch.Tensor) -> dict[str, _Entry]:
    from bitsandbytes.functional import quantize_4bit

    values, state = quantize_4bit(sample, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)
    state.dtype = torch.bfloat16  # of the model that was quantized
    entries = {}
    for name, shape in shapes.items():
        if not _is_quantized(name, shape):
            entries[name] = _plain(name, shape)
            continue
        state.shape = shape
        parts: dict[str, Any] = {
            f"{name}.{key}": _whole(part) for key, part in state.as_dict(packed=True).items()
        }
        parts[f"{name}.absmax"] = _Entry((shape.numel() // NF4_BLOCK,), state.absmax)
        entries |= {name: _Entry((shape.numel() // 2, 1), values), **parts}
    return entries


_ENTRIES = {"bf16": _bf16, "fp8": _fp8, "nf4": _nf4}


def _write_safetensors(path: Path, entries: Mapping[str, _Entry]) -> None:
    # Wide elements first, as the safetensors library sorts them: nothing is misaligned.
    order = sorted(entries, key=lambda name: (-entries[name].content.dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        entry = entries[name]
        end = offset + entry.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[entry.content.dtype],
            "shape": entry.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            _write_repeated(file, entries[name])


def _write_repeated(file: Any, entry: _Entry) -> None:
    content = memoryview(entry.content.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for start in range(0, entry.nbytes, len(content)):
        file.write(content[: entry.nbytes - start])
