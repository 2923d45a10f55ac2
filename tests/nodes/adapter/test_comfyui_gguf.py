"""ComfyUI-GGUF, the best-known pack for GGUF files, loads the files that Snug writes and decodes the same weights.

Needs a checkout of it: SNUG_COMFYUI_GGUF=path/to/ComfyUI-GGUF ./test tests/nodes/adapter/test_comfyui_gguf.py
"""

from __future__ import annotations

import importlib
import json
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
from snug.quant_backends.writers import tokenizer_metadata, write_gguf, write_text_encoder_gguf
from snug.quant_backends.writers.mixes import MIXES
from vocabularies import tekken

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


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_it_loads_language_models(architecture: str, peer: Any, tmp_path: Path) -> None:
    """It takes the rows of LLaMA and Mistral for those of 32 and 8 heads."""
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (256, 256),
        "model.norm.weight": (256,),
        f"{layer}.self_attn.q_proj.weight": (512, 256),
        f"{layer}.self_attn.k_proj.weight": (128, 256),
        f"{layer}.mlp.down_proj.weight": (256, 512),
        f"{layer}.post_attention_layernorm.weight": (256,),
    }
    if architecture == "qwen3":
        shapes[f"{layer}.self_attn.q_norm.weight"] = (128,)
    generator = torch.Generator().manual_seed(4)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    heads = {f"{architecture}.attention.head_count": 32, f"{architecture}.attention.head_count_kv": 8}
    path = tmp_path / "encoder.gguf"
    write_text_encoder_gguf(path, tensors, architecture, "Q8_0", metadata=heads)
    found = peer.gguf_clip_loader(str(path))
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        decoded = peer.dequantize_tensor(tensor, dtype=torch.float32, dequant_dtype=torch.float32)
        assert torch.allclose(torch.as_tensor(decoded), tensors[name], atol=0.02), name


def test_it_builds_mistrals_tokenizer(peer: Any, tmp_path: Path) -> None:
    content = json.dumps(tekken()).encode()
    metadata = {"llama.attention.head_count": 1, **tokenizer_metadata("tekken_model", content, 6100)}
    path = tmp_path / "mistral.gguf"
    tensors = {"model.layers.0.self_attn.v_proj.weight": torch.zeros(32, 32)}
    write_text_encoder_gguf(path, tensors, "llama", None, metadata=metadata)
    # By this shape it knows the model.
    found = json.loads(peer.gguf_tekken_tokenizer_loader(str(path), (131072, 5120)).numpy().tobytes())
    ranks = {entry["rank"]: entry["token_bytes"] for entry in tekken()["vocab"]}
    assert {entry["rank"]: entry["token_bytes"] for entry in found["vocab"]}.items() >= ranks.items()
    assert found["special_tokens"] == tekken()["special_tokens"]
