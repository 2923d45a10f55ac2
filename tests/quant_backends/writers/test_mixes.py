"""Mixes: which layer gets which format."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.writers import gguf_file
from snug.quant_backends.writers.mixes import MIXES, block_numbers, mixed_format
from snug.quant_backends.writers.plan import plan_tensors
from snug.quant_backends.writers.precision import RULES


def chosen(mix: str, name: str, block: int = 5, blocks: int = 16, shape: tuple[int, ...] = (512, 512)) -> str:
    fmt = mixed_format(MIXES[mix], name, shape, block, blocks)
    return fmt.name if fmt else "kept"


# Rows of the published table: mix, then what a value projection, a fused one, a last feed-forward layer and any other
# layer get in a block that is none of the first.
DIFFUSION = {
    "Q2_K": ("Q3_K", "Q2_K", "Q2_K", "Q2_K"),
    "Q3_K_S": ("Q3_K", "Q3_K", "Q3_K", "Q3_K"),
    "Q3_K_M": ("Q4_K", "Q4_K", "Q4_K", "Q3_K"),
    "Q3_K_L": ("Q5_K", "Q4_K", "Q5_K", "Q3_K"),
    "Q4_0": ("Q4_0", "Q4_0", "Q4_1", "Q4_0"),
    "Q4_K_S": ("Q4_K", "Q4_K", "Q5_K", "Q4_K"),
    "Q4_K_M": ("Q6_K", "Q5_K", "Q6_K", "Q4_K"),
    "Q5_0": ("Q5_0", "Q5_0", "Q5_1", "Q5_0"),
    "Q5_K_S": ("Q5_K", "Q5_K", "Q5_K", "Q5_K"),
    "Q5_K_M": ("Q6_K", "Q6_K", "Q6_K", "Q5_K"),
}


@pytest.mark.parametrize("mix", DIFFUSION)
def test_diffusion_models(mix: str) -> None:
    names = (
        "transformer_blocks.5.attn.to_v.weight",
        "double_blocks.5.img_attn.qkv",
        "blocks.5.ffn.2.weight",
        "blocks.5.ffn.0.weight",
    )
    assert tuple(chosen(mix, name) for name in names) == DIFFUSION[mix]
    for name in ("blocks.5.self_attn.v", "double_layers.5.attn.w1v", "blocks.5.cross_attn.v_proj"):
        assert chosen(mix, name) == DIFFUSION[mix][0]
    assert chosen(mix, "layers.5.attention.qkv") == DIFFUSION[mix][1]
    for name in ("layers.5.feed_forward.w2", "blocks.5.mlp.layer2", "transformer_blocks.5.ff.net.2"):
        assert chosen(mix, name) == DIFFUSION[mix][2]


def test_every_mix_is_tested_and_names_formats_that_exist() -> None:
    assert set(DIFFUSION) == set(MIXES)
    for mix in MIXES.values():
        for rules in (mix.diffusion, mix.language):
            assert {fmt for found in rules.values() for _, fmt in found} <= FORMATS.keys()


@pytest.mark.parametrize(
    ("mix", "first"), [("Q3_K_M", ["Q5_K"] * 2 + ["Q4_K"] * 3), ("Q4_K_S", ["Q5_K"] * 4 + ["Q4_K"])]
)
def test_the_first_blocks_get_more(mix: str, first: list[str]) -> None:
    assert [chosen(mix, f"blocks.{block}.self_attn.v", block) for block in range(5)] == first
    assert chosen(mix, "output_blocks.0.1.transformer_blocks.0.attn1.to_v", 0) == first[-1]


@pytest.mark.parametrize(
    "down", ["encoder.block.{}.layer.1.DenseReluDense.wo", "model.layers.{}.mlp.down_proj"]
)
def test_language_models_as_llama_cpp_mixes_them(down: str) -> None:
    # use_more_bits of 16 blocks: the first and the last two, and of those between 4, 7, 10 and 13.
    more = [0, 1, 4, 7, 10, 13, 14, 15]
    assert [n for n in range(16) if chosen("Q4_K_M", down.format(n), n) == "Q6_K"] == more
    assert [n for n in range(16) if chosen("Q4_K_S", down.format(n), n) == "Q5_K"] == [0, 1]
    assert [n for n in range(16) if chosen("Q3_K_M", down.format(n), n) == "Q5_K"] == [0]
    assert chosen("Q4_0", down.format(3)) == "Q4_0"


def test_language_models_have_roles_of_their_own() -> None:
    assert chosen("Q2_K", "model.layers.3.self_attn.v_proj", shape=(512, 512)) == "Q3_K"
    assert (
        chosen("Q2_K", "model.layers.3.self_attn.v_proj", shape=(128, 512)) == "Q4_K"
    )  # shared by four heads
    assert chosen("Q3_K_L", "t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.o") == "Q5_K"
    assert chosen("Q3_K_M", "blk.3.attn_output.weight") == "Q4_K"
    for name in ("shared.weight", "model.embed_tokens.weight", "token_embd.weight"):
        assert chosen("Q4_K_S", name) == "Q6_K"


def test_rows_that_are_no_whole_super_blocks() -> None:
    assert chosen("Q4_K_M", "blocks.0.ffn.0", shape=(64, 96)) == "kept"
    assert chosen("Q4_0", "blocks.0.ffn.0", shape=(64, 96)) == "Q4_0"
    assert chosen("Q4_K_S", "model.layers.9.mlp.up_proj", shape=(64, 96)) == "Q5_0"
    assert chosen("Q4_K_S", "model.layers.9.mlp.up_proj", shape=(64, 33)) == "kept"


def test_block_numbers() -> None:
    names = ["img_in.weight", "blocks.0.v.weight", "blocks.11.ffn.2.weight", "model.layers.3.mlp.up_proj"]
    assert block_numbers(names) == dict(zip(names, [(0, 1), (0, 12), (11, 12), (3, 4)], strict=True))


def test_a_plan_mixes() -> None:
    tensors = {
        f"double_blocks.{number}.{name}": torch.zeros(64, 512)
        for number in range(2)
        for name in ("img_attn.qkv.weight", "img_mlp.0.weight")
    }
    tensors["final_layer.linear.weight"] = torch.zeros(64, 512)
    plan = plan_tensors(tensors, MIXES["Q4_K_M"], RULES["flux"])
    assert [planned.format.name for planned in plan] == ["Q5_K", "Q4_K"] * 2 + ["F16"]


@pytest.mark.parametrize("name", MIXES)
def test_file_type(name: str) -> None:
    assert gguf_file._file_type(gguf, name) == gguf.LlamaFileType[f"MOSTLY_{name}"]


def test_a_file_of_a_mix(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = (
        "head.modulation",
        "blocks.0.self_attn.norm_q.weight",
        "blocks.0.ffn.0.weight",
        "blocks.0.ffn.2.weight",
    )
    tensors = {name: torch.randn(64, 512, generator=generator) for name in names}
    gguf_file.write_gguf(tmp_path / "model.gguf", tensors, "Q4_0")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["blocks.0.ffn.0.weight"], kinds["blocks.0.ffn.2.weight"]) == ("Q4_0", "Q4_1")
