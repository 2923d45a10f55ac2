"""Damaged checkpoints and ControlNets: FileFormatError or a result, nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from damage import DAMAGES, Damage, check_damaged_files
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers import GGUFFile
from snug.quant_backends.readers.checkpoint_parts import open_checkpoint_gguf, open_checkpoint_safetensors
from snug.quant_backends.readers.controlnet_kind import refuse_other_kinds, with_dense
from snug.quant_backends.readers.diffusion_gguf import load_repaired
from snug.quant_backends.readers.safetensors_file import SafetensorsFile
from text_encoder_files import add, finish

ENCODER = "cond_stage_model.1.transformer.text_model."
SHAPES = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.middle_block.1.proj_in.weight": (32, 32),
    f"{ENCODER}embeddings.token_embedding.weight": (4, 64),
    f"{ENCODER}encoder.layers.0.self_attn.in_proj.weight": (96, 32),
    f"{ENCODER}text_projection": (32, 32),
    "text_encoders.t5xxl.transformer.enc.blk.0.attn_q.weight": (32, 32),
    "vae.decoder.mid.attn_1.q.weight": (32, 32),
    "vae.decoder.conv_in.weight": (8, 4, 3, 3),
    "v_pred": (1,),
}
CONTROL = {
    "controlnet_blocks.0.weight": (32, 32),
    "controlnet_x_embedder.weight": (32, 32),
    "transformer_blocks.0.attn.to_q.weight": (32, 32),
    "task_embedding": (6, 32),
    "zero_convs.0.0.bias": (32,),
    **{f"single_transformer_blocks.{number}.proj_mlp.weight": (32, 32) for number in range(12)},
}


def decode(values: dict[str, PackedTensor | torch.Tensor]) -> None:
    for value in values.values():
        dequantize_packed(value) if isinstance(value, PackedTensor) else value.clone()


def use_gguf(path: Path) -> None:
    decode(open_checkpoint_gguf(GGUFFile(path)).state_dict())


def use_safetensors(path: Path) -> None:
    decode(open_checkpoint_safetensors(SafetensorsFile(path)).state_dict())


def use_controlnet(path: Path) -> None:
    file = GGUFFile(path)
    refuse_other_kinds(path, file.tensors, file.metadata)
    decode(with_dense(load_repaired(file, file.tensors)))


def gguf_of(shapes: dict[str, tuple[int, ...]], path: Path) -> tuple[bytes, int]:
    writer = gguf.GGUFWriter(path, "sd1")
    for name, shape in shapes.items():
        add(writer, name, torch.zeros(shape), "Q8_0")
    finish(writer, path)
    return path.read_bytes() + bytes(1024), min(info.offset for info in GGUFFile(path).tensors.values())


def safetensors_of(path: Path) -> tuple[bytes, int]:
    """FP8 with scales, as its only quantization."""
    header, data = {}, b""
    tensors = [(name, "F8_E4M3", shape, 1) for name, shape in SHAPES.items()]
    tensors += [
        (name.removesuffix("weight") + "scale_weight", "F32", (), 4) for name in SHAPES if "weight" in name
    ]
    for name, dtype, shape, size in tensors:
        end = len(data) + torch.Size(shape).numel() * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), end]}
        data = data.ljust(end, b"\0")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data + bytes(1024), 8 + len(text)


FILES: dict[str, tuple[Callable[[Path], tuple[bytes, int]], str, Callable[[Path], None]]] = {
    "GGUF": (lambda path: gguf_of(SHAPES, path), ".gguf", use_gguf),
    "safetensors": (safetensors_of, ".safetensors", use_safetensors),
    "ControlNet": (lambda path: gguf_of(CONTROL, path), ".gguf", use_controlnet),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_undamaged_file_is_valid(kind: str, tmp_path: Path) -> None:
    make, ending, use = FILES[kind]
    path = tmp_path / f"valid{ending}"
    path.write_bytes(make(path)[0])
    use(path)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(kind: str, damage: Damage, tmp_path: Path) -> None:
    make, ending, use = FILES[kind]
    check_damaged_files(damage, make(tmp_path / f"valid{ending}"), tmp_path, ending, use)
