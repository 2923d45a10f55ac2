"""Tokenizers rebuilt from GGUF metadata give the token ids of the originals."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from prompts import PROMPTS
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.readers import open_text_encoder_gguf
from snug.quant_backends.readers.tokenizers import needed_tokenizer, tokenizer_tensor
from text_encoder_files import add, finish
from vocabularies import (
    TEKKEN_SPECIALS,
    gemma4,
    sentencepiece_model,
    tekken_texts,
    write_gemma4,
    write_sentencepiece,
    write_tekken,
)

sentencepiece = pytest.importorskip("sentencepiece")

ROWS = 6100


def write(path: Path, architecture: str, setup: Callable[[Any], None]) -> Any:
    writer = gguf.GGUFWriter(path, architecture)
    setup(writer)
    t5 = architecture.startswith("t5")
    add(writer, "enc.blk.0.attn_q.weight" if t5 else "blk.0.attn_q.weight", torch.zeros(32, 32), "F32")
    add(writer, "token_embd.weight", torch.zeros(ROWS, 32), "F32")
    return open_text_encoder_gguf(finish(writer, path))


@pytest.mark.parametrize(
    "architecture,kind", [("t5encoder", "unigram"), ("gemma2", "bpe"), ("gemma3", "bpe")]
)
def test_sentencepiece(architecture: str, kind: str, tmp_path: Path) -> None:
    original = sentencepiece_model(kind)
    encoder = write(
        tmp_path / "te.gguf", architecture, lambda writer: write_sentencepiece(writer, original, kind, ROWS)
    )
    assert needed_tokenizer(encoder) == "spiece_model"
    tensor = tokenizer_tensor(encoder, "spiece_model")
    assert tensor.dtype == torch.uint8
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=tensor.numpy().tobytes())
    for text in PROMPTS:
        assert rebuilt.encode(text) == original.encode(text), text
        wanted = original.encode(text, add_bos=kind == "bpe", add_eos=True)
        assert rebuilt.encode(text, add_bos=kind == "bpe", add_eos=True) == wanted
    for number in (rebuilt.unk_id, rebuilt.eos_id, rebuilt.bos_id, rebuilt.pad_id):
        assert number() == getattr(original, number.__name__)()


def test_the_model_is_built_once_per_file(tmp_path: Path) -> None:
    original = sentencepiece_model("unigram")
    encoder = write(
        tmp_path / "te.gguf", "t5", lambda writer: write_sentencepiece(writer, original, "unigram", ROWS)
    )
    first = tokenizer_tensor(encoder, "spiece_model")
    assert tokenizer_tensor(encoder, "spiece_model") is first
    encoder.path.touch()
    assert tokenizer_tensor(encoder, "spiece_model") is not first


def test_tekken(tmp_path: Path) -> None:
    encoder = write(tmp_path / "mistral.gguf", "llama", lambda writer: write_tekken(writer, ROWS))
    assert needed_tokenizer(encoder) == "tekken_model"
    found = json.loads(tokenizer_tensor(encoder, "tekken_model").numpy().tobytes())
    assert [base64.b64decode(entry["token_bytes"]) for entry in found["vocab"]] == tekken_texts()
    assert [entry["rank"] for entry in found["vocab"]] == list(range(len(tekken_texts())))
    assert [entry["token_str"] for entry in found["special_tokens"]] == TEKKEN_SPECIALS
    assert found["config"]["default_vocab_size"] == ROWS
    assert found["config"]["default_num_special_tokens"] == len(TEKKEN_SPECIALS)


def test_gemma4(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    encoder = write(tmp_path / "gemma4.gguf", "gemma4", lambda writer: write_gemma4(writer, ROWS + 300))
    assert needed_tokenizer(encoder) == "tokenizer_json"
    text = tokenizer_tensor(encoder, "tokenizer_json").numpy().tobytes().decode()
    rebuilt, original = (
        tokenizers.Tokenizer.from_str(text),
        tokenizers.Tokenizer.from_str(json.dumps(gemma4())),
    )
    for prompt in PROMPTS:
        ids = original.encode(prompt).ids
        assert rebuilt.encode(prompt).ids == ids, prompt


@pytest.mark.parametrize("merges", [["a"], ["a b c"], ["a nowhere"]])
def test_damaged_merges(merges: list[str], tmp_path: Path) -> None:
    def setup(writer: Any) -> None:
        writer.add_tokenizer_model("gemma4")
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_types([1, 1, 1])
        writer.add_token_merges(merges)

    encoder = write(tmp_path / "te.gguf", "gemma4", setup)
    with pytest.raises(FileFormatError, match="merge"):
        tokenizer_tensor(encoder, "tokenizer_json")


def test_llama_3_and_qwen_bring_none(tmp_path: Path) -> None:
    for architecture, pre in (("llama", "llama-bpe"), ("qwen3", "qwen2")):
        encoder = write(
            tmp_path / f"{pre}.gguf", architecture, lambda writer, pre=pre: writer.add_tokenizer_pre(pre)
        )
        assert needed_tokenizer(encoder) is None


@pytest.mark.parametrize(
    "setup,message",
    [
        (lambda writer: None, "is missing, expected t5 or llama"),
        (lambda writer: writer.add_tokenizer_model("gpt2"), "'gpt2', expected t5 or llama"),
        (
            lambda writer: (
                writer.add_tokenizer_model("t5"),
                writer.add_token_list(["a"]),
                writer.add_token_types([1]),
            ),
            "1 tokens, 0 scores and 1 types",
        ),
        (
            lambda writer: (
                writer.add_tokenizer_model("t5"),
                writer.add_token_list(["a"]),
                writer.add_token_types([1]),
                writer.add_key_value(  # more than a float32 holds
                    "tokenizer.ggml.scores",
                    [1e300],
                    gguf.GGUFValueType.ARRAY,
                    sub_type=gguf.GGUFValueType.FLOAT64,
                ),
            ),
            "scores that are no ordinary numbers",
        ),
    ],
)
def test_files_without_a_tokenizer(setup: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    encoder = write(tmp_path / "te.gguf", "gemma2", setup)
    with pytest.raises(FileFormatError, match=message):
        tokenizer_tensor(encoder, "spiece_model")
