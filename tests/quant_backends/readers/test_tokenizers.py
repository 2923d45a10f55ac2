"""Tokenizers rebuilt from GGUF metadata give the token ids of the originals."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.readers import open_text_encoder_gguf
from snug.quant_backends.readers.tokenizers import needed_tokenizer, tokenizer_tensor
from text_encoder_files import add, finish

sentencepiece = pytest.importorskip("sentencepiece")

SENTENCES = """
A photograph of an astronaut riding a horse on the moon, cinematic light, 35mm
beautiful oil painting, (masterpiece:1.2), [low quality], best_quality!! ultra-detailed...
Ein Bär läuft über die Straße; größer als je zuvor
un café crème à l'étage, « œuvre » naïve, garçon
рыжая лиса под луной, акварель, зимний лес
水彩画、月の下の赤い狐、とても美しい
一只红色的狐狸在月光下，水彩画，高清
달빛 아래 붉은 여우 수채화
ثعلب أحمر تحت ضوء القمر
שועל אדום לאור הירח
लाल लोमड़ी चाँदनी में जलरंग
สุนัขจิ้งจอกแดงใต้แสงจันทร์
κόκκινη αλεπού κάτω από το φεγγάρι
con cáo đỏ dưới ánh trăng
🦊🌙 fox emoji 👩‍🚀🏽 flag 🇩🇪 heart ❤️
  leading and   double  spaces, trailing
tab\there and ＦＵＬＬＷＩＤＴＨ ﬁ ligature ½ ① ™
<start_of_turn>user hello<end_of_turn> </s> <pad> <unk>
100% 3.14159 $5 @user #tag a_b-c/d\\e {x} ~^` "quotes" 'single'
""".strip("\n").split("\n")
PROMPTS = [
    *SENTENCES,
    "",
    " ",
    *(a[:24] + " " + b[::2] for a, b in zip(SENTENCES, SENTENCES[1:], strict=False)),
]


def train(kind: str, special: bool) -> Any:
    """A small model as those of UMT5 (unigram, NFKC) and Gemma (byte-pair, identity, bytes)."""
    target = io.BytesIO()
    unigram = kind == "unigram"
    options = {
        "model_type": kind,
        "vocab_size": 600,
        "character_coverage": 0.98,
        "byte_fallback": True,
        "normalization_rule_name": "nmt_nfkc" if unigram else "identity",
        "add_dummy_prefix": unigram,
        "remove_extra_whitespaces": unigram,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": -1 if unigram else 2,
        "unk_id": 2 if unigram else 3,
        "pad_piece": "<pad>",
        "bos_piece": "<bos>",
        "eos_piece": "</s>" if unigram else "<eos>",
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    if special:
        options["user_defined_symbols"] = ["<start_of_turn>", "<end_of_turn>"]
    corpus = iter(SENTENCES * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=corpus, model_writer=target, **options)
    return sentencepiece.SentencePieceProcessor(model_proto=target.getvalue())


def piece_type(model: Any, number: int) -> int:
    for kind, check in (
        (2, model.is_unknown),
        (3, model.is_control),
        (5, model.is_unused),
        (6, model.is_byte),
    ):
        if check(number):
            return kind
    return 4 if model.id_to_piece(number).startswith("<") else 1  # as user_defined_symbols above


def charsmap(proto: bytes) -> bytes:
    """ModelProto.normalizer_spec (3) .precompiled_charsmap (2)."""
    normalizer = next(body for number, body in fields(proto) if number == 3)
    return next(body for number, body in fields(normalizer) if number == 2)


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every length-delimited field of a protobuf message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        tag = varint()
        if tag & 7 == 2:
            size = varint()
            yield tag >> 3, message[position : position + size]
            position += size
        elif tag & 7 == 5:
            position += 4
        else:
            varint()


def vocabulary(writer: Any, model: Any, kind: str) -> None:
    """What convert_hf_to_gguf.py writes of a SentencePiece model."""
    count = model.get_piece_size()
    tokens = [model.id_to_piece(number) for number in range(count)]
    scores = [model.get_score(number) for number in range(count)]
    types = [piece_type(model, number) for number in range(count)]
    if kind == "llama":  # tokens that the tokenizer's settings call special become CONTROL
        types = [
            3 if token.startswith("<") and t in (2, 4) else t for token, t in zip(tokens, types, strict=True)
        ]
    for number in range(len(tokens), len(tokens) + 8):  # padding to the size of the embedding table
        tokens.append(f"[PAD{number}]")
        scores.append(-1000.0)
        types.append(5)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(kind == "t5")
    if kind == "t5":
        writer.add_remove_extra_whitespaces(True)
        writer.add_precompiled_charsmap(charsmap(model.serialized_model_proto()))
        writer.add_unk_token_id(model.unk_id())
    else:
        writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_pad_token_id(model.pad_id())


def write(path: Path, architecture: str, setup: Callable[[Any], None]) -> Any:
    writer = gguf.GGUFWriter(path, architecture)
    setup(writer)
    t5 = architecture.startswith("t5")
    add(writer, "enc.blk.0.attn_q.weight" if t5 else "blk.0.attn_q.weight", torch.zeros(32, 32), "F32")
    add(writer, "token_embd.weight", torch.zeros(608, 32), "F32")
    return open_text_encoder_gguf(finish(writer, path))


@pytest.mark.parametrize("architecture,kind", [("t5encoder", "t5"), ("gemma2", "llama"), ("gemma3", "llama")])
def test_sentencepiece(architecture: str, kind: str, tmp_path: Path) -> None:
    original = train("unigram" if kind == "t5" else "bpe", special=kind == "llama")
    encoder = write(tmp_path / "te.gguf", architecture, lambda writer: vocabulary(writer, original, kind))
    assert needed_tokenizer(encoder) == "spiece_model"
    tensor = tokenizer_tensor(encoder, "spiece_model")
    assert tensor.dtype == torch.uint8
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=tensor.numpy().tobytes())
    for text in PROMPTS:
        assert rebuilt.encode(text) == original.encode(text), text
        wanted = original.encode(text, add_bos=kind == "llama", add_eos=True)
        assert rebuilt.encode(text, add_bos=kind == "llama", add_eos=True) == wanted
    for number in (rebuilt.unk_id, rebuilt.eos_id, rebuilt.bos_id, rebuilt.pad_id):
        assert number() == getattr(original, number.__name__)()


def test_the_model_is_built_once_per_file(tmp_path: Path) -> None:
    original = train("unigram", special=False)
    encoder = write(tmp_path / "te.gguf", "t5", lambda writer: vocabulary(writer, original, "t5"))
    first = tokenizer_tensor(encoder, "spiece_model")
    assert tokenizer_tensor(encoder, "spiece_model") is first
    encoder.path.touch()
    assert tokenizer_tensor(encoder, "spiece_model") is not first


def byte_characters() -> dict[int, str]:
    """GPT-2's bytes_to_unicode."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printing]
    return {value: chr(value) for value in printing} | {v: chr(256 + n) for n, v in enumerate(others)}


def test_tekken(tmp_path: Path) -> None:
    import base64

    characters = byte_characters()
    texts = [bytes([value]) for value in range(256)] + [b" the", "é".encode(), "狐".encode()[:2]]

    def setup(writer: Any) -> None:
        tokens = ["<unk>", "<s>", "</s>", "[INST]"]
        tokens += ["".join(characters[value] for value in text) for text in texts] + ["[PAD263]"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("tekken")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 4 + [1] * len(texts) + [5])

    encoder = write(tmp_path / "mistral.gguf", "llama", setup)
    assert needed_tokenizer(encoder) == "tekken_model"
    found = json.loads(tokenizer_tensor(encoder, "tekken_model").numpy().tobytes())
    assert [base64.b64decode(entry["token_bytes"]) for entry in found["vocab"]] == texts
    assert [entry["rank"] for entry in found["vocab"]] == list(range(len(texts)))
    assert [entry["token_str"] for entry in found["special_tokens"]] == ["<unk>", "<s>", "</s>", "[INST]"]
    assert found["config"]["default_vocab_size"] == 4 + len(texts) + 1
    assert found["config"]["default_num_special_tokens"] == 4


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
    ],
)
def test_files_without_a_tokenizer(setup: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    encoder = write(tmp_path / "te.gguf", "gemma2", setup)
    with pytest.raises(FileFormatError, match=message):
        tokenizer_tensor(encoder, "spiece_model")
