"""Damaged safetensors by the thousand, as test_mutations does for GGUF."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from damage import DAMAGES, Damage, check_damaged_files
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers.conventions import open_quantized_safetensors

OWN_PARTS = {"scale": 2, "factor": 4, "step": 1, "shift": 1, "offset": 2}


@pytest.fixture(scope="module")
def valid() -> tuple[bytes, int]:
    """A file that mixes all conventions; its texts come first, so that they are damaged like the header."""
    state = json.dumps(
        {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 64]}
        | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    ).encode()
    tensors = [
        ("a.weight.quant_state.bitsandbytes__nf4", "U8", [len(state)], state),
        ("a.weight", "U8", [64, 1], bytes(range(64))),
        ("a.weight.absmax", "U8", [2], b"\x01\x02"),
        ("a.weight.quant_map", "F32", [16], struct.pack("<16f", *range(16))),
        ("a.weight.nested_absmax", "F32", [1], struct.pack("<f", 1)),
        ("a.weight.nested_quant_map", "F32", [256], struct.pack("<256f", *range(256))),
        ("b.weight", "I8", [2, 4], bytes(8)),
        ("b.SCB", "F32", [2], struct.pack("<2f", 1, 2)),
        ("c.weight", "F8_E4M3", [2, 4], bytes(8)),
        ("c.scale_weight", "F32", [], struct.pack("<f", 1)),
        ("d.weight._data._data", "U8", [4, 16], bytes(64)),
        ("d.weight._scale", "F16", [8, 1], bytes(16)),
        ("d.weight._shift", "F16", [8, 1], bytes(16)),
        ("d.bias", "F16", [4], bytes(8)),
        ("e._weight_qdata", "I8", [2, 32], bytes(64)),
        ("e._weight_scale", "BF16", [2, 1], bytes(4)),
        ("f.weight", "F8_E5M2", [4, 8], bytes(32)),
        ("f.weight_scale_inv", "F32", [2, 2], bytes(16)),
        ("g.weight", "F8_E4M3", [2, 4], bytes(8)),
        ("g.weight_scale", "F32", [1], struct.pack("<f", 1)),
        ("g.input_scale", "F32", [1], struct.pack("<f", 1)),
        ("h.weight", "I8", [2, 4], bytes(8)),
        *((f"h.snug_{part}", "F32", [size], bytes(4 * size)) for part, size in OWN_PARTS.items()),
    ]
    kind = {"_type": "Int8Tensor", "_data": {"block_size": [1, 32]}, "_tensor_data_names": ["qdata", "scale"]}
    activations = {"b": "outliers 6", "c": "dynamic", "g": "static", "h": "static"}
    header: dict[str, object] = {
        "__metadata__": {
            "tensor_names": json.dumps(["e.weight"]),
            "e.weight": json.dumps(kind),
            "snug_activations": json.dumps(activations),
        }
    }
    data = b""
    for name, dtype, shape, content in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    data += bytes(512)  # no tensor's: a file cut off there still reads
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data, 8 + len(text) + len(state)


def use(path: Path) -> None:
    loaded = open_quantized_safetensors(path)
    for tensor in loaded.state_dict.values():
        if isinstance(tensor, PackedTensor):
            dequantize_packed(tensor)
        else:
            tensor.clone()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage: Damage, valid: tuple[bytes, int], tmp_path: Path) -> None:
    check_damaged_files(damage, valid, tmp_path, ".safetensors", use)


def test_the_undamaged_file_is_valid(valid: tuple[bytes, int], tmp_path: Path) -> None:
    path = tmp_path / "valid.safetensors"
    path.write_bytes(valid[0])
    use(path)
    loaded = open_quantized_safetensors(path)
    assert {name for name, value in loaded.state_dict.items() if isinstance(value, PackedTensor)} == {
        f"{layer}.weight" for layer in "abcdefgh"
    }
    assert loaded.convention.name == "bitsandbytes-4bit+bitsandbytes-int8+torchao+quanto+scaled-fp8"
