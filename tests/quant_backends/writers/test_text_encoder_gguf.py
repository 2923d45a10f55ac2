"""Text encoders that were written come back under their names with the same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels.dequantize import dequantize, dequantize_packed, quantize
from snug.quant_backends.readers.text_encoder_gguf import open_text_encoder_gguf
from snug.quant_backends.writers import write_text_encoder_gguf

T5 = {
    "shared.weight": (64, 256),
    "encoder.final_layer_norm.weight": (256,),
    **{f"encoder.block.0.layer.0.SelfAttention.{part}.weight": (256, 256) for part in "qkvo"},
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
    "encoder.block.0.layer.0.layer_norm.weight": (256,),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (512, 256),
    "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": (512, 256),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": (256, 512),
    "encoder.block.0.layer.1.layer_norm.weight": (256,),
}
UNGATED = {name.replace("wi_1", "wi"): shape for name, shape in T5.items() if "wi_0" not in name}
LLAMA = {
    "model.embed_tokens.weight": (64, 256),
    "model.norm.weight": (256,),
    "model.layers.0.input_layernorm.weight": (256,),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.self_attn.k_proj.weight": (128, 256),
    "model.layers.0.self_attn.v_proj.weight": (128, 256),
    "model.layers.0.self_attn.o_proj.weight": (256, 256),
    "model.layers.0.post_attention_layernorm.weight": (256,),
    "model.layers.0.mlp.up_proj.weight": (512, 256),
    "model.layers.0.mlp.gate_proj.weight": (512, 256),
    "model.layers.0.mlp.down_proj.weight": (256, 512),
}
QWEN2 = {**LLAMA, "model.layers.0.self_attn.q_proj.bias": (256,)}
GEMMA = {**LLAMA, "model.layers.0.pre_feedforward_layernorm.weight": (256,)}
HEADS = {"llama.attention.head_count": 8, "llama.attention.head_count_kv": 4}
ENCODERS = {
    "t5encoder": (T5, {}),
    "t5 ungated": (UNGATED, {}),
    "llama": (LLAMA, HEADS),
    "qwen2vl": (QWEN2, {}),
    "qwen3": (LLAMA, {}),
    "gemma3": (GEMMA, {}),
}


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(shape, generator=generator) / 20 for name, shape in shapes.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["quantized", "packed before"])
@pytest.mark.parametrize("name", ENCODERS)
def test_round_trip(name: str, packed: bool, tmp_path: Path) -> None:
    shapes, metadata = ENCODERS[name]
    tensors = random_tensors(shapes)
    fmt = FORMATS["Q8_0"]
    matrices = [key for key, value in tensors.items() if value.dim() == 2 and "relative" not in key]
    given = {
        key: PackedTensor(quantize(value, fmt).view(-1), fmt, tuple(value.shape))
        if packed and key in matrices
        else value
        for key, value in tensors.items()
    }
    path = tmp_path / "encoder.gguf"
    write_text_encoder_gguf(path, given, name.split()[0], None if packed else "Q8_0", metadata=metadata)

    assert all(
        tensor.name.startswith(("blk.", "enc.", "token_embd", "output_norm"))
        for tensor in gguf.GGUFReader(path).tensors
    )
    found = open_text_encoder_gguf(path).state_dict()
    assert found.keys() == tensors.keys()
    for key, value in found.items():
        decoded = dequantize_packed(value) if isinstance(value, PackedTensor) else value
        wanted = tensors[key]
        if key in matrices:
            wanted = dequantize(quantize(wanted, fmt), fmt, wanted.shape)
        assert torch.allclose(decoded.float(), wanted, atol=1e-6), key


def test_a_mix_knows_the_layers(tmp_path: Path) -> None:
    path = tmp_path / "encoder.gguf"
    write_text_encoder_gguf(path, random_tensors(T5), "t5encoder", "Q3_K_L")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["enc.blk.0.attn_v.weight"] == kinds["enc.blk.0.ffn_down.weight"] == "Q5_K"
    assert kinds["token_embd.weight"] == "Q6_K" and kinds["enc.blk.0.attn_q.weight"] == "Q3_K"
    assert kinds["enc.blk.0.attn_rel_b.weight"] == "F32"


def test_head_counts_are_needed_and_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "encoder.gguf"
    with pytest.raises(SnugError, match="llama.attention.head_count is missing"):
        write_text_encoder_gguf(path, random_tensors(LLAMA), "llama", "Q8_0")
    with pytest.raises(SnugError, match="256 rows, no even number for each of the 7 heads"):
        write_text_encoder_gguf(
            path, random_tensors(LLAMA), "llama", "Q8_0", metadata={"llama.attention.head_count": 7}
        )
    with pytest.raises(SnugError, match="'mine' is no text encoder.*t5encoder"):
        write_text_encoder_gguf(path, random_tensors(LLAMA), "mine", "Q8_0")
    assert list(tmp_path.iterdir()) == []
