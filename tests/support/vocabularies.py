"""Vocabularies of several thousand pieces, and how llama.cpp's converter writes them into GGUF metadata.

The real ones cannot be downloaded for a test: these are trained with the libraries' own trainers on the help pages
that ComfyUI brings in ten languages, with the settings of the original models.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from prompts import OTHER_SCRIPTS

# Pieces of Gemma's model that stand for themselves: turn markers (which its settings call special), markup, runs
# of whitespace.
GEMMA_MARKERS = ["<start_of_turn>", "<end_of_turn>", "<unused0>"]
GEMMA_SYMBOLS = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "▁▁▁▁▁▁▁▁", "<table>", "</h1>"]
T5_SYMBOLS = ["<extra_id_0>", "<extra_id_1>"]
SPACE = "▁"
TEKKEN_SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    *(f"<SPECIAL_{n}>" for n in range(5, 11)),
    "<pad>",
]
TEKKEN_SPECIALS += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", *(f"<SPECIAL_{n}>" for n in range(14, 40))]


@lru_cache
def corpus(languages: int = 10, kilobytes: int = 100) -> list[str]:
    """Lines of text, `kilobytes` of each language."""
    spec = importlib.util.find_spec("comfyui_embedded_docs")
    if spec is None or spec.origin is None:
        pytest.skip("comfyui_embedded_docs, which ComfyUI requires, is not installed")
    by_language: dict[str, list[Path]] = {}
    for path in sorted(Path(spec.origin).parent.rglob("*.md")):
        by_language.setdefault(path.stem, []).append(path)
    lines: list[str] = [*OTHER_SCRIPTS * 20]
    for paths in list(by_language.values())[:languages]:
        size = 0
        for path in paths:
            text = path.read_text(encoding="utf-8")
            lines += [line for line in text.splitlines() if line]
            size += len(text)
            if size > 1000 * kilobytes:
                break
    return lines


@lru_cache
def sentencepiece_model(kind: str) -> Any:
    """As that of UMT5 ("unigram": NFKC, spaces joined) or Gemma ("bpe": nothing changed, bytes as a last resort)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    unigram = kind == "unigram"
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=target,
        model_type=kind,
        vocab_size=6000,
        character_coverage=0.9995,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=2,
        minloglevel=2,
        normalization_rule_name="nmt_nfkc" if unigram else "identity",
        add_dummy_prefix=unigram,
        remove_extra_whitespaces=unigram,
        pad_id=0,
        eos_id=1,
        bos_id=-1 if unigram else 2,
        unk_id=2 if unigram else 3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="</s>" if unigram else "<eos>",
        user_defined_symbols=T5_SYMBOLS if unigram else GEMMA_MARKERS + GEMMA_SYMBOLS,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=target.getvalue())


def write_sentencepiece(writer: Any, model: Any, kind: str, rows: int) -> None:
    """What convert_hf_to_gguf.py writes of a SentencePiece model, padded to the rows of the embedding table.

    Its types come from the model, which does not tell user-defined pieces from normal ones, and for Gemma from the
    tokenizer's settings, which list its user-defined pieces, some as special; spaces in them are written as such.
    """
    count = model.get_piece_size()
    tokens = [model.id_to_piece(number) for number in range(count)]
    scores = [model.get_score(number) for number in range(count)]
    types = [_piece_type(model, number) for number in range(count)]
    if kind == "bpe":
        for number, token in enumerate(tokens):
            if token in ("<pad>", "<eos>", "<bos>", "<unk>", *GEMMA_MARKERS):
                types[number], scores[number] = 3, -1000.0
            elif token in GEMMA_SYMBOLS:
                tokens[number], types[number], scores[number] = token.replace(SPACE, " "), 4, -1000.0
    writer.add_tokenizer_model("t5" if kind == "unigram" else "llama")
    writer.add_token_list([*tokens, *(f"[PAD{number}]" for number in range(count, rows))])
    writer.add_token_scores([*scores, *[-1000.0] * (rows - count)])
    writer.add_token_types([*types, *[5] * (rows - count)])
    writer.add_add_space_prefix(kind == "unigram")
    if kind == "unigram":
        writer.add_remove_extra_whitespaces(True)
        writer.add_precompiled_charsmap(_charsmap(model.serialized_model_proto()))
        writer.add_unk_token_id(model.unk_id())
    else:
        writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_pad_token_id(model.pad_id())


def _piece_type(model: Any, number: int) -> int:
    checks = ((2, model.is_unknown), (3, model.is_control), (5, model.is_unused), (6, model.is_byte))
    return next((kind for kind, check in checks if check(number)), 1)


def _charsmap(proto: bytes) -> bytes:
    """ModelProto.normalizer_spec (3) .precompiled_charsmap (2)."""
    normalizer = next(body for number, body in _fields(proto) if number == 3)
    return next(body for number, body in _fields(normalizer) if number == 2)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
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


def byte_characters() -> dict[int, str]:
    """GPT-2's bytes_to_unicode."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printing]
    return {value: chr(value) for value in printing} | {v: chr(256 + n) for n, v in enumerate(others)}


@lru_cache
def tekken() -> dict[str, Any]:
    """A byte-level vocabulary in the form of Mistral's tekken.json: the bytes, then merges by rank."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus(), vocab_size=6000, min_frequency=2, show_progress=False)
    byte_of = {character: value for value, character in byte_characters().items()}
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    texts = [bytes([value]) for value in range(256)]
    texts += [
        text for token, _ in vocabulary if len(text := bytes(byte_of[character] for character in token)) > 1
    ]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(text).decode(), "token_str": None}
        for rank, text in enumerate(texts)
    ]
    config = {
        "num_vocab_tokens": len(texts),
        "default_vocab_size": len(TEKKEN_SPECIALS) + len(texts),
        "default_num_special_tokens": len(TEKKEN_SPECIALS),
    }
    special = [
        {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(TEKKEN_SPECIALS)
    ]
    return {"config": config, "vocab": entries, "special_tokens": special}


def tekken_texts() -> list[bytes]:
    return [base64.b64decode(entry["token_bytes"]) for entry in tekken()["vocab"]]


def write_tekken(writer: Any, rows: int) -> None:
    """As llama.cpp writes it: GPT-2's characters for bytes."""
    characters = byte_characters()
    tokens = TEKKEN_SPECIALS + ["".join(characters[value] for value in text) for text in tekken_texts()]
    types = [3] * len(TEKKEN_SPECIALS) + [1] * (len(tokens) - len(TEKKEN_SPECIALS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list(tokens + [f"[PAD{number}]" for number in range(len(tokens), rows)])
    writer.add_token_types(types + [5] * (rows - len(tokens)))


GEMMA4_SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|image|>"]
GEMMA4_VISIBLE = ["<|channel>", "<channel|>"]


@lru_cache
def gemma4() -> dict[str, Any]:
    """The tokenizer.json of a byte-pair vocabulary as Gemma 4's: spaces as U+2581, bytes as a last resort."""
    tokenizers = pytest.importorskip("tokenizers")
    replace = tokenizers.normalizers.Replace(" ", SPACE)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = replace
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=6000, show_progress=False, max_token_length=16)
    trained.train_from_iterator([line[:200] for line in corpus(10, 30)], trainer)
    found = json.loads(trained.to_str())
    names = [*GEMMA4_SPECIALS, *GEMMA4_VISIBLE, *(f"<0x{value:02X}>" for value in range(256))]
    known = sorted(found["model"]["vocab"], key=found["model"]["vocab"].__getitem__)
    found["model"] |= {
        "vocab": {token: number for number, token in enumerate([*names, *known])},
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    found["added_tokens"] = [
        {"id": number, "content": token, "special": token in GEMMA4_SPECIALS}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, token in enumerate(names[: len(GEMMA4_SPECIALS) + len(GEMMA4_VISIBLE)])
    ]
    return found


def write_gemma4(writer: Any, rows: int) -> None:
    """As llama.cpp's Gemma4Model.set_vocab does, padded to `rows`."""
    model = gemma4()["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = {**dict.fromkeys(GEMMA4_SPECIALS, 3), **dict.fromkeys(GEMMA4_VISIBLE, 4)}
    types = [kinds.get(token, 6 if token.startswith("<0x") else 1) for token in tokens]
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list([*tokens, *(f"[PAD{number}]" for number in range(len(tokens), rows))])
    writer.add_token_scores([-1000.0] * rows)
    writer.add_token_types([*types, *[5] * (rows - len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_add_space_prefix(False)
