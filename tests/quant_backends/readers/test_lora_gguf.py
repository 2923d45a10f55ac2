"""GGUF LoRAs in the core: factors and names, and files that are damaged or something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from damage import DAMAGES, Damage, check_damaged_files
from lora_files import random_factors, write_adapter
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.readers import GGUFFile
from snug.quant_backends.readers.lora_gguf import open_lora_gguf
from snug.quant_backends.readers.lora_names import is_lora, lora_target


def use(path: Path) -> None:
    lora = open_lora_gguf(path)
    lora.named_tensors()
    for layer in lora.pairs:
        lora.factors(layer, heads=2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    factors = random_factors({f"blk.{n}.attn_q": (64, 32) for n in range(6)} | {"blk.1.ffn_up": (96, 32)})
    return write_adapter(tmp_path / "valid.gguf", factors, "llama", "Q8_0", alpha=8.0)


def test_names_rows_and_scale(adapter: Path) -> None:
    lora = open_lora_gguf(adapter)
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"} < set(lora.pairs)
    assert lora.alpha == 8.0
    down, up = lora.factors("model.layers.1.mlp.up_proj")
    assert (down.shape, up.shape) == ((32, 32), (96, 32)) and up.dtype == torch.float32
    assert lora.is_permuted("model.layers.0.self_attn.q_proj")
    with pytest.raises(FileFormatError, match="64 rows, no even number for each of 3 heads"):
        lora.factors("model.layers.0.self_attn.q_proj", heads=3)


def test_one_factor_alone_and_factors_of_two_ranks(tmp_path: Path) -> None:
    down, up = random_factors({"x": (64, 32)})["x"]
    path = write_adapter(tmp_path / "ranks.gguf", {"double_blocks.0.x": (down, up[:, :16])}, "flux")
    with pytest.raises(FileFormatError, match=r"double_blocks\.0\.x.* are \(32, 32\) and \(64, 16\)"):
        open_lora_gguf(path)
    content = path.read_bytes().replace(b"x.weight.lora_b", b"x.weight.lora_?")
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="only one of its two factors"):
        open_lora_gguf(path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage: Damage, adapter: Path, tmp_path: Path) -> None:
    header = min(info.offset for info in GGUFFile(adapter).tensors.values())
    check_damaged_files(damage, (adapter.read_bytes() + bytes(1024), header), tmp_path, ".gguf", use)


@pytest.mark.parametrize(
    "name,columns,target",
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 8, "Flux or HunyuanVideo"),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
            2048,
            "SDXL",
        ),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora.down.weight",
            768,
            "Stable Diffusion 1.5",
        ),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", 8, "Stable Diffusion 1, 2 or SDXL"),
        (
            "transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight",
            8,
            "Stable Diffusion 3 or Qwen-Image",
        ),
        ("diffusion_model.layers.3.attention.qkv.lora_A.weight", 8, "Lumina 2 or Z-Image"),
        ("joint_blocks.0.x_block.attn.qkv.weight.lora_a", 8, "Stable Diffusion 3"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", 8, "a text encoder"),
        ("blk.3.attn_q.weight.lora_a", 8, "a text encoder"),
        ("something.lokr_w1", 8, None),
    ],
)
def test_target(name: str, columns: int, target: str | None) -> None:
    assert lora_target({name: (4, columns)}) == target


def test_models_are_no_loras() -> None:
    assert not is_lora(
        ["model.diffusion_model.input_blocks.0.0.weight", "blocks.0.norm.alpha", "a.diff.weight"]
    )
