"""Tokenizers in the metadata: as llama.cpp's converter writes them, and read again with the same tokens."""

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
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.readers.text_encoder_gguf import open_text_encoder_gguf
from snug.quant_backends.readers.tokenizers import needed_tokenizer, tokenizer_tensor
from snug.quant_backends.writers import tokenizer_metadata, write_text_encoder_gguf
from vocabularies import TEKKEN_SPECIALS, byte_characters, gemma4, tekken, write_gemma4, write_tekken

ROWS = 7000
WEIGHT = {"model.layers.0.self_attn.v_proj.weight": torch.zeros(32, 32)}


def written(path: Path, key: str, tokenizer: Any, architecture: str) -> Any:
    content = json.dumps(tokenizer, ensure_ascii=False).encode()
    heads = {"llama.attention.head_count": 1} if architecture == "llama" else {}
    metadata = {**heads, **tokenizer_metadata(key, content, ROWS)}
    write_text_encoder_gguf(path, WEIGHT, architecture, None, metadata=metadata)
    encoder = open_text_encoder_gguf(path)
    assert needed_tokenizer(encoder) == key
    return json.loads(tokenizer_tensor(encoder, key).numpy().tobytes())


def fields(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {
        name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.ggml.")
    }


def as_converted(path: Path, write: Callable[[Any, int], None]) -> dict[str, Any]:
    """What the test's own account of llama.cpp's converter writes."""
    writer = gguf.GGUFWriter(path, "llama")
    write(writer, ROWS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return fields(path)


def mistral_tokenizer_json() -> dict[str, Any]:
    """The same vocabulary as Hugging Face has it."""
    characters = byte_characters()
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in tekken()["vocab"]]
    spelled = ["".join(characters[value] for value in token) for token in tokens]
    count = len(TEKKEN_SPECIALS)
    return {
        "added_tokens": [
            {"id": number, "content": token, "special": True} for number, token in enumerate(TEKKEN_SPECIALS)
        ],
        "model": {"type": "BPE", "vocab": {token: count + rank for rank, token in enumerate(spelled)}},
    }


def test_tekken(tmp_path: Path) -> None:
    found = written(tmp_path / "te.gguf", "tekken_model", tekken(), "llama")
    assert [(e["rank"], e["token_bytes"]) for e in found["vocab"]] == [
        (e["rank"], e["token_bytes"]) for e in tekken()["vocab"]
    ]
    assert found["special_tokens"] == tekken()["special_tokens"]
    assert found["config"]["default_num_special_tokens"] == len(TEKKEN_SPECIALS)
    stored, wanted = fields(tmp_path / "te.gguf"), as_converted(tmp_path / "other.gguf", write_tekken)
    assert wanted.items() <= stored.items()
    assert [stored[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")] == [
        1,
        2,
        0,
        11,
    ]
    assert tokenizer_metadata("tekken_model", json.dumps(mistral_tokenizer_json()).encode(), ROWS) == (
        tokenizer_metadata("tekken_model", json.dumps(tekken()).encode(), ROWS)
    )


def test_tekken_merges_give_the_same_tokens() -> None:
    """As the byte-pair encoding of the tokenizers package takes them, against merging by rank."""
    tokenizers = pytest.importorskip("tokenizers")
    metadata: Any = tokenizer_metadata("tekken_model", json.dumps(tekken()).encode(), ROWS)
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    order = [(vocabulary[left + right], vocabulary[left], vocabulary[right]) for left, right in merges]
    assert order == sorted(set(order))  # as llama.cpp's converter has them
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    ranks = {base64.b64decode(e["token_bytes"]): e["rank"] for e in tekken()["vocab"]}
    characters = byte_characters()
    for word in " ".join(PROMPTS[:60]).split():
        parts = [bytes([value]) for value in word.encode()]
        while pairs := [
            (ranks[a + b], n)
            for n, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in ranks
        ]:
            place = min(pairs)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        spelled = "".join(characters[value] for value in word.encode())
        assert model.encode(spelled).ids == [len(TEKKEN_SPECIALS) + ranks[part] for part in parts], word


def test_numbers_without_a_special_token_stay_free(tmp_path: Path) -> None:
    tokenizer = {**tekken(), "special_tokens": tekken()["special_tokens"][:12]}
    found = written(tmp_path / "te.gguf", "tekken_model", tokenizer, "llama")
    assert found["special_tokens"] == tokenizer["special_tokens"]
    assert found["config"]["default_num_special_tokens"] == len(TEKKEN_SPECIALS)
    assert len(found["vocab"]) == len(tokenizer["vocab"])


def test_gemma4(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    found = written(tmp_path / "te.gguf", "tokenizer_json", gemma4(), "gemma4")
    wanted = as_converted(tmp_path / "other.gguf", write_gemma4)
    stored = fields(tmp_path / "te.gguf")
    types, expected = (values.pop("tokenizer.ggml.token_type") for values in (stored, wanted))
    assert types == expected and wanted.items() <= stored.items()
    assert stored["tokenizer.ggml.bos_token_id"] == 2
    rebuilt, original = (tokenizers.Tokenizer.from_str(json.dumps(value)) for value in (found, gemma4()))
    for prompt in PROMPTS:
        assert rebuilt.encode(prompt).ids == original.encode(prompt).ids, prompt


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"truncation": {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_keys_cannot_say_goes_along(change: dict[str, Any], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = {**gemma4(), **change}
    found = written(tmp_path / "te.gguf", "tokenizer_json", tokenizer, "gemma4")
    field = gguf.GGUFReader(tmp_path / "te.gguf").get_field("tokenizer.huggingface.json")
    assert field is not None and json.loads(field.contents()) == tokenizer == found
    ids = [
        tokenizers.Tokenizer.from_str(json.dumps(value)).encode("a  b").ids for value in (found, tokenizer)
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("tekken_model", b"no JSON", "no valid JSON"),
        ("tekken_model", b"[]", "no JSON object"),
        ("tekken_model", b"{}", "no tekken vocabulary"),
        ("tokenizer_json", b"{}", "no byte-pair vocabulary"),
        ("tokenizer_json", b'{"model": {"type": "Unigram", "vocab": []}}', "no byte-pair vocabulary"),
        ("tokenizer_json", b'{"model": {"vocab": {"a": "b"}, "merges": []}}', "no byte-pair vocabulary"),
        (
            "tokenizer_json",
            b'{"model": {"vocab": {"a": 1000000000000}, "merges": []}}',
            "no byte-pair vocabulary",
        ),
        (
            "tekken_model",
            b'{"config": {"default_num_special_tokens": 1000000000000, "default_vocab_size": 9}}',
            "no tekken vocabulary",
        ),
        ("spiece_model", b"\n\n\n", "no SentencePiece model, or a damaged one"),
    ],
)
def test_what_is_no_such_tokenizer(key: str, content: bytes, message: str) -> None:
    with pytest.raises(SnugError, match=message):
        tokenizer_metadata(key, content, ROWS)


def test_damaged_tekken() -> None:
    vocabulary = tekken()["vocab"]
    for damaged in (vocabulary[1:], vocabulary[:99], [*vocabulary[:300], vocabulary[300] | {"rank": -1}]):
        with pytest.raises(SnugError, match="no tekken vocabulary"):
            tokenizer_metadata("tekken_model", json.dumps({**tekken(), "vocab": damaged}).encode(), ROWS)


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(SnugError, match=r"has \d+ tokens, the embedding table only 32 rows.*another model"):
        tokenizer_metadata("tekken_model", json.dumps(tekken()).encode(), 32)
