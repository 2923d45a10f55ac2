"""Text encoders that become GGUF files: llama.cpp's names, and the tokenizer from wherever it lies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from prompts import PROMPTS
from safetensors.torch import load_file, save_file
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels.dequantize import quantize_packed
from snug.quant_backends.readers.text_encoder_gguf import open_text_encoder_gguf
from snug.quant_backends.readers.tokenizers import needed_tokenizer, tokenizer_tensor
from vocabularies import gemma4, sentencepiece_model, tekken

Run = Callable[..., tuple[int, str, str]]
Tensors = dict[str, torch.Tensor]
ROWS = 6400
QUERY, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


def random(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def t5(rows: int) -> Tensors:
    return random(
        {
            "shared.weight": (rows, 256),
            "encoder.final_layer_norm.weight": (256,),
            **{f"encoder.block.0.layer.0.SelfAttention.{part}.weight": (256, 256) for part in "qkvo"},
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (512, 256),
            "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": (512, 256),
            "encoder.block.0.layer.1.DenseReluDense.wo.weight": (256, 512),
        }
    )


def language_model(*more: str, rows: int = ROWS) -> Tensors:
    return random(
        {
            EMBEDDING: (rows, 256),
            "model.norm.weight": (256,),
            QUERY: (512, 256),
            "model.layers.0.self_attn.k_proj.weight": (256, 256),
            "model.layers.0.mlp.up_proj.weight": (512, 256),
            **dict.fromkeys(more, (256,)),
        }
    )


GEMMA = "model.layers.0.pre_feedforward_layernorm.weight"
NORM = "model.layers.0.self_attn.q_norm.weight"
GEMMA4 = (GEMMA, NORM, "model.layers.0.layer_scalar")


def is_same(found: Path, tensors: Tensors) -> None:
    """The encoder in the GGUF file, with the query in Q8_0."""
    stored = open_text_encoder_gguf(found).state_dict()
    assert stored.keys() == tensors.keys()
    name = next(name for name in tensors if name.endswith(("q_proj.weight", "SelfAttention.q.weight")))
    query = stored[name]
    assert isinstance(query, PackedTensor)
    assert torch.equal(query.data.view(-1), quantize_packed(tensors[name], FORMATS["Q8_0"]).data.view(-1))
    for key in ("model.norm.weight", "encoder.final_layer_norm.weight"):
        if key in tensors:
            value = stored[key]
            assert isinstance(value, torch.Tensor)
            assert torch.allclose(value, tensors[key].float(), atol=1e-6)


def test_nested_names(snug: Run, tmp_path: Path) -> None:
    """Of a language model beside a vision part, as it is published."""
    tensors, source, out = language_model(NORM), tmp_path / "qwen.safetensors", tmp_path / "qwen.gguf"
    save_file({name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}, source)
    assert snug("quantize", source, out, "--to", "GGUF Q8_0")[0] == 0
    is_same(out, tensors)


def test_t5_needs_no_tokenizer(snug: Run, tmp_path: Path) -> None:
    tensors, source, out = t5(384), tmp_path / "t5.safetensors", tmp_path / "t5.gguf"
    save_file(tensors, source)
    code, _, messages = snug("quantize", source, out, "--to", "GGUF Q8_0", "--skip", "")
    assert code == 0 and "7 layers quantized" in messages and "tokenizer: " not in messages
    is_same(out, tensors)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert kinds["enc.blk.0.attn_rel_b.weight"] == "F32" and kinds["token_embd.weight"] == "BF16"
    fields = gguf.GGUFReader(out).fields
    assert fields["general.architecture"].contents() == "t5encoder"
    assert fields["t5encoder.attention.head_count"].contents() == 64
    assert json.loads(fields["snug.provenance"].contents())["recipes"][0]["target"] == "GGUF Q8_0"


@pytest.mark.parametrize("place", ["beside", "pipeline", "option", "in the file"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece(kind: str, place: str, snug: Run, tmp_path: Path) -> None:
    """UMT5's and Gemma's."""
    import sentencepiece

    model = sentencepiece_model(kind)
    content = model.serialized_model_proto()
    tensors = t5(ROWS) if kind == "unigram" else language_model(GEMMA)
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    source, out, options = folder / "model.safetensors", tmp_path / "te.gguf", []
    stored = {"spiece_model": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
    save_file(tensors | (stored if place == "in the file" else {}), source)
    name = "spiece.model" if kind == "unigram" else "tokenizer.model"
    if place == "beside":
        (folder / name).write_bytes(content)
    elif place == "pipeline":
        (tmp_path / "tokenizer_2").mkdir()
        (tmp_path / "tokenizer_2" / name).write_bytes(content)
    elif place == "option":
        (tmp_path / "any.model").write_bytes(content)
        options = ["--tokenizer", tmp_path / "any.model"]
    code, _, messages = snug("quantize", source, out, "--to", "GGUF Q8_0", *options)
    assert code == 0, messages
    assert ("tokenizer: " in messages) == (place != "in the file")
    is_same(out, tensors)
    if place == "beside":  # converted again, nothing of the tokenizer is lost
        again = folder / "again.gguf"
        assert snug("convert", out, again)[0] == 0
        is_same(again, tensors)
        out = again
    encoder = open_text_encoder_gguf(out)
    assert needed_tokenizer(encoder) == "spiece_model"
    rebuilt = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer_tensor(encoder, "spiece_model").numpy().tobytes()
    )
    assert all(rebuilt.encode(text) == model.encode(text) for text in PROMPTS)


def test_mistral(snug: Run, tmp_path: Path) -> None:
    """Number of heads from config.json; converted again, nothing of the tokenizer is lost."""
    tensors, source, out = language_model(), tmp_path / "mistral.safetensors", tmp_path / "mistral.gguf"
    save_file(tensors, source)
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"num_attention_heads": 8, "num_key_value_heads": 4}})
    )
    (tmp_path / "tekken.json").write_text(json.dumps(tekken()))
    assert snug("quantize", source, out, "--to", "GGUF Q8_0")[0] == 0
    is_same(out, tensors)
    again = tmp_path / "again" / "mistral.gguf"
    again.parent.mkdir()
    assert snug("convert", out, again)[0] == 0
    is_same(again, tensors)
    for path in (out, again):
        encoder = open_text_encoder_gguf(path)
        assert needed_tokenizer(encoder) == "tekken_model"
        assert encoder.metadata["llama.attention.head_count_kv"] == 4
        found = json.loads(tokenizer_tensor(encoder, "tekken_model").numpy().tobytes())
        assert found["special_tokens"] == tekken()["special_tokens"]
        assert len(found["vocab"]) == len(tekken()["vocab"])
    rows = {t.name: t.data for t in gguf.GGUFReader(out).tensors}["blk.0.attn_q.weight"]
    packed = quantize_packed(tensors[QUERY], FORMATS["Q8_0"]).data.view(512, -1).numpy()
    assert (rows == packed.reshape(8, 2, -1, packed.shape[1]).swapaxes(1, 2).reshape(packed.shape)).all()


def test_heads_without_a_configuration(snug: Run, tmp_path: Path) -> None:
    """128 rows each, as all text encoders of this kind have."""
    source, out = tmp_path / "mistral.safetensors", tmp_path / "mistral.gguf"
    save_file(language_model(), source)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken()))
    assert snug("convert", source, out)[0] == 0
    metadata = open_text_encoder_gguf(out).metadata
    assert [metadata[f"llama.attention.head_count{part}"] for part in ("", "_kv")] == [4, 2]


def test_gemma4(snug: Run, tmp_path: Path) -> None:
    tensors, source, out = language_model(*GEMMA4), tmp_path / "gemma.safetensors", tmp_path / "gemma.gguf"
    save_file(tensors, source)
    (tmp_path / "tokenizer.json").write_text(json.dumps(gemma4()))
    assert snug("quantize", source, out, "--to", "GGUF Q8_0")[0] == 0
    is_same(out, tensors)
    found = json.loads(tokenizer_tensor(open_text_encoder_gguf(out), "tokenizer_json").numpy().tobytes())
    assert found["model"]["vocab"] == gemma4()["model"]["vocab"]


def test_clip_keeps_its_names(snug: Run, tmp_path: Path) -> None:
    layer = "text_model.encoder.layers.0.self_attn"
    tensors = random({f"{layer}.{part}_proj.weight": (256, 256) for part in "qkv"})
    source, out = tmp_path / "clip_l.safetensors", tmp_path / "clip_l.gguf"
    positions = {"text_model.embeddings.position_ids": torch.arange(77)}
    save_file(tensors | positions, source)
    assert snug("quantize", source, out, "--to", "GGUF Q8_0")[0] == 0
    is_same(out, tensors)


def test_projection_keeps_its_names(snug: Run, tmp_path: Path) -> None:
    """LTX-2's; of a whole checkpoint's exclusions it would be left alone, so they are given."""
    stem = "model.diffusion_model.video_embeddings_connector"
    tensors = random(
        {
            "text_embedding_projection.aggregate_embed.weight": (64, 320),
            f"{stem}.learnable_registers": (8, 256),
            f"{stem}.transformer_1d_blocks.0.attn1.to_q.weight": (256, 256),
        }
    )
    source = tmp_path / "projection.safetensors"
    save_file(tensors, source)
    for out, options, packed in (
        (tmp_path / "default.gguf", (), {"to_q"}),
        (tmp_path / "all.gguf", ("--skip", "registers"), {"to_q", "aggregate_embed"}),
    ):
        assert snug("quantize", source, out, "--to", "GGUF Q8_0", *options)[0] == 0
        stored = open_text_encoder_gguf(out).state_dict()
        assert stored.keys() == tensors.keys()
        quantized = {
            name.split(".")[-2]
            for name, value in stored.items()
            if isinstance(value, PackedTensor) and value.format is FORMATS["Q8_0"]
        }
        assert quantized == packed
        registers = stored[f"{stem}.learnable_registers"]
        assert isinstance(registers, torch.Tensor)
        assert torch.equal(registers, tensors[f"{stem}.learnable_registers"].float())


@pytest.mark.parametrize(
    "layer",
    [
        "model.encoder.layers.0.self_attn.q_proj",  # T5Gemma
        "model.encoder.layers.0.mixer.Wqkv",  # Jina CLIP
        "bert.encoder.layer.0.attention.self.query",
        "layers.0.self_attn.q_proj",  # GPT-OSS, which its sinks tell
    ],
)
def test_kinds_that_go_into_safetensors(layer: str, snug: Run, tmp_path: Path) -> None:
    tensors = random({f"{layer}.weight": (256, 256), "embed_tokens.weight": (300, 256)})
    tensors |= random({"layers.0.self_attn.sinks": (8,)} if layer.startswith("layers") else {})
    source, out = tmp_path / "encoder.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    code, _, messages = snug("quantize", source, tmp_path / "out.gguf", "--to", "GGUF Q8_0")
    assert code == 1 and "a text encoder of a kind that cannot be loaded from a GGUF file" in messages
    assert snug("quantize", source, out, "--to", "FP8 e4m3fn per row")[0] == 0
    stored = load_file(out)
    assert stored[f"{layer}.weight"].dtype is torch.float8_e4m3fn
    assert stored["embed_tokens.weight"].dtype is torch.bfloat16


def test_what_is_refused(snug: Run, tmp_path: Path) -> None:
    for name, tensors in {
        "mistral": language_model(),
        "umt5": t5(ROWS),
        "qwen": language_model(NORM),
        "qwen35": random(
            {
                f"model.language_model.layers.0.{part}.weight": (256, 256)
                for part in ("self_attn.q_proj", "linear_attn.in_proj_qkv")
            }
        ),
        "gemma": language_model(GEMMA, rows=300),
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    folder = tmp_path / "tokenizers"
    folder.mkdir()
    (folder / "gemma.model").write_bytes(sentencepiece_model("bpe").serialized_model_proto())
    (folder / "tekken.json").write_text("{}")

    def refused(name: str, message: str, *options: Any, to: str = "GGUF Q8_0", out: str = "out.gguf") -> None:
        before = sorted(tmp_path.iterdir())
        code, _, messages = snug(
            "quantize", tmp_path / f"{name}.safetensors", tmp_path / out, "--to", to, *options
        )
        assert code == 1 and message in messages.replace("\n", " "), messages
        assert len(messages.splitlines()) <= 2 and sorted(tmp_path.iterdir()) == before

    refused("mistral", "pass --tokenizer FILE, the tekken.json or tokenizer.json published with the model")
    refused("umt5", "ComfyUI has no tokenizer for this text encoder")
    refused("umt5", "nowhere is no file", "--tokenizer", "nowhere")
    refused(
        "mistral",
        "no tekken vocabulary of Mistral's, or a damaged one",
        "--tokenizer",
        folder / "tekken.json",
    )
    refused("umt5", "no SentencePiece model, or a damaged one", "--tokenizer", folder / "tekken.json")
    refused("gemma", "the embedding table only 300 rows", "--tokenizer", folder / "gemma.model")
    refused("qwen", "ComfyUI brings the tokenizer", "--tokenizer", folder / "tekken.json")
    refused("qwen35", "cannot be loaded from a GGUF file")
    refused(
        "umt5",
        "--tokenizer is for text encoders that are written as .gguf",
        "--tokenizer",
        folder / "tekken.json",
        to="FP8 e4m3fn per row",
        out="out.safetensors",
    )
