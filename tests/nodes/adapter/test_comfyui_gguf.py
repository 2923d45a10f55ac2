"""ComfyUI-GGUF, the best-known pack for GGUF files, loads the files that Snug writes and decodes the same weights.

Needs a checkout of it: SNUG_COMFYUI_GGUF=path/to/ComfyUI-GGUF ./test tests/nodes/adapter/test_comfyui_gguf.py
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels.dequantize import dequantize
from snug.quant_backends.readers import GGUFFile
from snug.quant_backends.writers import write_gguf, write_text_encoder_gguf
from snug.quant_backends.writers.mixes import MIXES

FOLDER = os.environ.get("SNUG_COMFYUI_GGUF")
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(FOLDER is None, reason="SNUG_COMFYUI_GGUF names no checkout of ComfyUI-GGUF"),
]
# Types that it decodes itself or through the gguf package.
TYPES = [
    name for name, fmt in FORMATS.items() if fmt.can_quantize and name not in MIXES and fmt.dtype is None
]


@pytest.fixture(scope="module")
def peer(comfy: Any) -> Any:
    """Its loader, without the nodes that its package would register. `comfy`: ComfyUI can be imported."""
    package = ModuleType("comfyui_gguf_peer")
    package.__path__ = [str(FOLDER)]
    sys.modules["comfyui_gguf_peer"] = package
    return importlib.import_module("comfyui_gguf_peer.loader")


def wan(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {
        "head.modulation": (1, 2, 512),
        "patch_embedding.weight": (512, 16, 1, 2, 2),
        "blocks.0.self_attn.norm_q.weight": (512,),
        "blocks.0.modulation": (1, 6, 512),
        **{f"blocks.0.self_attn.{part}.weight": (512, 512) for part in "qkvo"},
        "blocks.0.ffn.0.weight": (1024, 512),
        "blocks.0.ffn.2.weight": (512, 1024),
        "head.head.weight": (64, 512),
    }
    return {
        name: torch.randn(shape, generator=generator).mul(0.05).bfloat16() for name, shape in shapes.items()
    }


def unet(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "time_embed.0.weight": (1280, 320),
        "input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight": (320, 320),
        "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    }
    return {name: torch.randn(shape, generator=generator).mul(0.05).half() for name, shape in shapes.items()}


@pytest.mark.parametrize("format", [*TYPES, *MIXES, "BF16", "F16", "F32"])
@pytest.mark.parametrize("network", [wan, unet])
def test_it_loads_what_snug_writes(network: Any, format: str, peer: Any, tmp_path: Path) -> None:
    tensors = network(torch.Generator().manual_seed(4))
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors, format)
    found, architecture = peer.gguf_sd_loader(str(path), return_arch=True)
    assert architecture == {wan: "wan", unet: "sd1"}[network]
    assert found.keys() == tensors.keys()
    file = GGUFFile(path)
    for name, tensor in found.items():
        assert tuple(tensor.tensor_shape) == tuple(tensors[name].shape)
        theirs = peer.dequantize_tensor(tensor, dtype=torch.float32, dequant_dtype=torch.float32)
        info = file.tensors[name]
        ours = dequantize(file.read(name), info.format, tuple(tensors[name].shape))
        assert torch.allclose(torch.as_tensor(theirs).reshape(ours.shape), ours, rtol=1e-6, atol=1e-7), name


def test_it_loads_t5(peer: Any, tmp_path: Path) -> None:
    names = [f"encoder.block.0.layer.0.SelfAttention.{part}.weight" for part in "qkvo"]
    names += [f"encoder.block.0.layer.1.DenseReluDense.{part}.weight" for part in ("wi_0", "wi_1", "wo")]
    names += ["shared.weight", "encoder.block.0.layer.0.layer_norm.weight", "encoder.final_layer_norm.weight"]
    names += ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    generator = torch.Generator().manual_seed(4)
    tensors = {
        name: torch.randn((256,) if "norm" in name else (256, 256), generator=generator) for name in names
    }
    path = tmp_path / "t5.gguf"
    write_text_encoder_gguf(path, tensors, "t5encoder", "Q8_0")
    found = peer.sd_map_replace(peer.gguf_sd_loader(str(path), is_text_model=True), peer.T5_SD_MAP)
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        decoded = peer.dequantize_tensor(tensor, dtype=torch.float32, dequant_dtype=torch.float32)
        assert torch.allclose(torch.as_tensor(decoded), tensors[name], atol=0.02), name
