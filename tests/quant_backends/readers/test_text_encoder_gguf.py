"""Text encoders as the converters write them, read back: row order, norms, names, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers import open_text_encoder_gguf, open_vision_gguf
from text_encoder_files import add, finish, snap, write_mmproj, write_text_encoder


def dense(tensor: PackedTensor | torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, PackedTensor):
        return dequantize_packed(tensor)
    return tensor


def random(*shape: int, format: str = "F32", seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return snap(values, format) if format != "F32" else values


def llama_block(format: str, columns: int = 256) -> dict[str, torch.Tensor]:
    prefix = "model.layers.0."
    return {
        "model.embed_tokens.weight": random(64, columns, format=format),
        "model.norm.weight": random(columns),
        prefix + "input_layernorm.weight": random(columns, seed=1),
        prefix + "self_attn.q_proj.weight": random(256, columns, format=format),
        prefix + "self_attn.k_proj.weight": random(64, columns, format=format),
        prefix + "self_attn.v_proj.weight": random(64, columns, format=format, seed=2),
        prefix + "self_attn.o_proj.weight": random(columns, 256, format=format, seed=3),
        prefix + "post_attention_layernorm.weight": random(columns, seed=4),
        prefix + "mlp.up_proj.weight": random(96, columns, format=format),
    }


@pytest.mark.parametrize("format", ["Q4_0", "Q8_0", "F16", "F32"])
@pytest.mark.parametrize("architecture,heads", [("llama", (8, 2)), ("mistral3", (4, 1)), ("qwen3", (8, 2))])
def test_rows_of_query_and_key(
    format: str, architecture: str, heads: tuple[int, int], tmp_path: Path
) -> None:
    weights = llama_block(format)
    path = write_text_encoder(tmp_path / "llm.gguf", weights, architecture, format, heads)
    found = open_text_encoder_gguf(path).state_dict()
    assert set(found) == set(weights)
    for name, wanted in weights.items():
        assert torch.equal(dense(found[name]), wanted), name
    assert isinstance(found["model.layers.0.self_attn.q_proj.weight"], PackedTensor) == (format != "F32")


def test_permuted_rows_are_moved_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.quant_backends.readers import text_encoder_gguf

    path = write_text_encoder(tmp_path / "llm.gguf", llama_block("Q8_0"), "llama", "Q8_0", (8, 2))
    decoded: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        text_encoder_gguf,
        "dequantize",
        lambda data, fmt, shape, dtype: decoded.append(shape) or torch.zeros(shape),
    )
    open_text_encoder_gguf(path).state_dict()
    assert decoded == []


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_norms_of_gemma(architecture: str, tmp_path: Path) -> None:
    prefix = "model.layers.0."
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    weights = {
        "model.norm.weight": torch.tensor([0.25, -0.5, 1.0]),
        **{f"{prefix}{name}_layernorm.weight": torch.tensor([0.5, 0.0, -1.0]) for name in norms},
        prefix + "self_attn.q_proj.weight": random(32, 32, format="Q8_0"),
    }
    if architecture == "gemma3":
        weights[prefix + "self_attn.q_norm.weight"] = torch.tensor([0.125])
    path = write_text_encoder(tmp_path / "gemma.gguf", weights, architecture)
    found = open_text_encoder_gguf(path).state_dict()
    assert set(found) == set(weights)
    assert all(torch.equal(dense(found[name]), wanted) for name, wanted in weights.items())


@pytest.mark.parametrize("gated", [True, False])
def test_t5(gated: bool, tmp_path: Path) -> None:
    block = "encoder.block.0.layer."
    ups = ("wi_0", "wi_1") if gated else ("wi",)
    weights = {
        "shared.weight": random(40, 32, format="Q8_0"),
        block + "0.SelfAttention.q.weight": random(32, 32, format="Q8_0"),
        block + "0.SelfAttention.relative_attention_bias.weight": random(32, 4),
        block + "0.layer_norm.weight": random(32),
        **{f"{block}1.DenseReluDense.{up}.weight": random(64, 32, format="Q8_0") for up in ups},
        "encoder.final_layer_norm.weight": random(32),
    }
    extra = {"dec.blk.0.attn_q.weight": random(32, 32)}
    path = write_text_encoder(tmp_path / "t5.gguf", weights, "t5", extra=extra)
    found = open_text_encoder_gguf(path).state_dict()
    assert set(found) == set(weights)
    assert all(torch.equal(dense(found[name]), wanted) for name, wanted in weights.items())


def write(path: Path, tensors: Mapping[str, torch.Tensor], architecture: str, **text: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in text.items():
        writer.add_string(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        add(writer, name, tensor, "F32")
    return finish(writer, path)


@pytest.mark.parametrize("prefix", ["", "text_encoders.clip_l.transformer.", "cond_stage_model.transformer."])
def test_original_names_are_kept_without_their_prefix(prefix: str, tmp_path: Path) -> None:
    names = {"text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.position_embedding.weight"}
    path = write(tmp_path / "clip.gguf", {prefix + name: random(32, 32) for name in names}, "clip_l")
    assert set(open_text_encoder_gguf(path).infos) == names


def refusals() -> list[Any]:
    tensor = {"x.weight": torch.zeros(2, 2)}
    vision = {"v.blk.0.ln1.weight": torch.zeros(2), "mm.0.weight": torch.zeros(2, 2)}
    block = {"blk.0.attn_q.weight": torch.zeros(8, 8)}
    lora = {"blk.0.attn_q.weight.lora_a": torch.zeros(2, 2)}
    flux = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}
    checkpoint = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2)}
    return [
        pytest.param(
            flux, "flux", "the file is a diffusion model.*Load Diffusion Model", id="diffusion model"
        ),
        pytest.param(checkpoint, "sd1", "whole checkpoint.*only the text encoder", id="checkpoint"),
        pytest.param(vision, "clip", "mmproj.*choose the text encoder here", id="vision part"),
        pytest.param(lora, "llama", "a LoRA.*LoRA loader", id="LoRA"),
        pytest.param(block, "mamba", "architecture 'mamba', expected one of .*qwen2vl", id="architecture"),
        pytest.param(tensor, "", "no text encoder", id="nothing known"),
    ]


@pytest.mark.parametrize("tensors,architecture,message", refusals())
def test_other_files_are_refused_by_name(
    tensors: dict[str, torch.Tensor], architecture: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "odd.gguf", tensors, architecture)
    with pytest.raises(FileFormatError, match=rf"odd\.gguf: .*{message}"):
        open_text_encoder_gguf(path)


@pytest.mark.parametrize("heads,message", [(None, "head_count' is missing"), ((7, 7), "256 rows.*7 heads")])
def test_head_counts_are_checked(heads: Any, message: str, tmp_path: Path) -> None:
    weights = {"blk.0.attn_q.weight": torch.zeros(256, 32)}
    writer = gguf.GGUFWriter(tmp_path / "llm.gguf", "llama")
    if heads:
        writer.add_head_count(heads[0])
    for name, tensor in weights.items():
        add(writer, name, tensor, "Q8_0")
    encoder = open_text_encoder_gguf(finish(writer, tmp_path / "llm.gguf"))
    with pytest.raises(FileFormatError, match=message):
        encoder.state_dict()


@pytest.mark.parametrize("format", ["Q8_0", "F16", "F32"])
def test_attention_of_the_vision_part_is_joined(format: str, tmp_path: Path) -> None:
    weights = {
        "patch_embed.proj.weight": random(32, 3, 2, 4, 4),
        "blocks.0.attn.qkv.weight": random(96, 32, format=format),
        "blocks.0.attn.qkv.bias": random(96),
        "blocks.0.attn.proj.weight": random(32, 32, format=format),
        "blocks.0.norm1.weight": random(32),
        "blocks.0.mlp.gate_proj.weight": random(64, 32, format=format),
        "merger.ln_q.weight": random(32, seed=1),
        "merger.mlp.0.weight": random(64, 64, format=format, seed=1),
        "merger.mlp.2.weight": random(48, 64, format=format, seed=1),
    }
    vision = open_vision_gguf(write_mmproj(tmp_path / "mmproj.gguf", weights, "qwen2.5vl_merger", format))
    assert vision.width == 48
    found = vision.state_dict()
    assert set(found) == {f"visual.{name}" for name in weights}
    for name, wanted in weights.items():
        assert torch.equal(dense(found[f"visual.{name}"]), wanted), name
    assert isinstance(found["visual.blocks.0.attn.qkv.weight"], PackedTensor) == (format != "F32")


@pytest.mark.parametrize(
    "make,message",
    [
        (
            lambda path: write(path, {"blk.0.attn_q.weight": torch.zeros(8, 8)}, "qwen2vl"),
            "is not the vision part",
        ),
        (
            lambda path: write(
                path,
                {"mm.2.weight": torch.zeros(8, 8), "v.blk.0.ln1.weight": torch.zeros(8)},
                "clip",
                clip__projector_type="pixtral",
            ),
            "kind 'pixtral', expected one of qwen2.5vl_merger",
        ),
    ],
)
def test_unusable_vision_parts_are_refused(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FileFormatError, match=message):
        open_vision_gguf(make(tmp_path / "mmproj.gguf"))
