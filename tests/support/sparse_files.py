"""Files as large as real models that hold a real header and nothing else, and what is read of them."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.readers.safetensors_file import DTYPES

Shapes = Mapping[str, tuple[int, ...]]
ALIGNMENT = 32


def flux_shapes(double: int = 19, single: int = 38, width: int = 3072) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Flux.1 dev, which has 11.9 billion weights, by the layers of its reference code."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, columns: int) -> None:
        shapes.update({f"{name}.weight": (out, columns), f"{name}.bias": (out,)})

    linear("img_in", width, 64)
    for name, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        linear(f"{name}.in_layer", width, columns)
        linear(f"{name}.out_layer", width, width)
    linear("txt_in", width, 4096)
    for block in range(double):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{block}.{stream}"
            linear(f"{prefix}_mod.lin", 6 * width, width)
            linear(f"{prefix}_attn.qkv", 3 * width, width)
            linear(f"{prefix}_attn.proj", width, width)
            linear(f"{prefix}_mlp.0", 4 * width, width)
            linear(f"{prefix}_mlp.2", width, 4 * width)
            shapes.update({f"{prefix}_attn.norm.{norm}_norm.scale": (128,) for norm in ("query", "key")})
    for block in range(single):
        prefix = f"single_blocks.{block}"
        linear(f"{prefix}.linear1", 7 * width, width)
        linear(f"{prefix}.linear2", width, 5 * width)
        linear(f"{prefix}.modulation.lin", 3 * width, width)
        shapes.update({f"{prefix}.norm.{norm}_norm.scale": (128,) for norm in ("query", "key")})
    linear("final_layer.linear", 64, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes


def sparse_gguf(path: Path, shapes: Shapes, format: str) -> None:
    """Matrices in blocks are in `format`, all else is F32 or F16; architecture flux."""
    entries, offset = [], 0
    for name, shape in shapes.items():
        quantized = len(shape) == 2 and "_blocks." in name
        fmt = FORMATS[format if quantized else "F16" if len(shape) == 2 else "F32"]
        stored = name.encode()
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        entries.append(_text(stored) + dims + struct.pack("<IQ", fmt.ggml_type, offset))
        offset += -(-fmt.nbytes(shape) // ALIGNMENT) * ALIGNMENT
    pair = _text(b"general.architecture") + struct.pack("<I", 8) + _text(b"flux")
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 1) + pair + b"".join(entries)
    _write(path, header + bytes(-len(header) % ALIGNMENT), offset)


def sparse_safetensors(path: Path, shapes: Shapes, dtype_name: str) -> None:
    """Everything in one dtype, by safetensors' name of it."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * DTYPES[dtype_name].itemsize
        header[name] = {"dtype": dtype_name, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    _write(path, struct.pack("<Q", len(text)) + text, offset)


def _text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _write(path: Path, header: bytes, data_bytes: int) -> None:
    path.write_bytes(header)
    os.truncate(path, len(header) + data_bytes)


def resident_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache (Linux): what was written and not dropped, and all that was read."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        address = ctypes.c_char.from_buffer(mapped)
        found = libc.mincore(ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(size), flags)
        del address
    if found:
        raise OSError(ctypes.get_errno(), "mincore")
    seen = torch.frombuffer(flags, dtype=torch.uint8)
    return int((seen & 1).sum()) * mmap.PAGESIZE
