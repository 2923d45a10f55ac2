"""Gemma 4's tokenizer.json as metadata of a GGUF file, as llama.cpp's converter writes it (conversion/gemma.py,
Gemma4Model.set_vocab): the way back of `readers.tokenizer_json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import SnugError
from ..readers.gguf_vocabulary import (
    BYTE,
    CONTROL,
    MAX_TOKENS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from ..readers.tokenizer_json import ORIGINAL, SPACE, UNKNOWN_TOKEN

if TYPE_CHECKING:
    from .gguf_file import MetadataValue

SPECIAL_TOKENS = {
    "bos": "<bos>",
    "eos": "<eos>",
    "unknown": UNKNOWN_TOKEN,
    "padding": "<pad>",
    "mask": "<mask>",
}
SCORE = -1000.0  # llama.cpp's, of a tokenizer that has none
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# What `readers.tokenizer_json` takes for granted, beside the vocabulary.
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}
_DEFAULTS = {**_MODEL, "fuse_unk": False, "byte_fallback": False}
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def tokenizer_json_metadata(tokenizer: Mapping[str, Any], rows: int) -> dict[str, MetadataValue]:
    """tokenizer: the parsed JSON. rows: of the embedding table, to which unused tokens are added.

    What llama.cpp's keys cannot say goes along as GGUF's "tokenizer.huggingface.json". Raises SnugError when it is no
    such tokenizer, or a damaged one.
    """
    try:
        return _metadata(tokenizer, rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnugError(
            "The tokenizer.json is no byte-pair vocabulary such as Gemma 4's, or a damaged one."
        ) from error


def _metadata(tokenizer: Mapping[str, Any], rows: int) -> dict[str, MetadataValue]:
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError("no byte-pair vocabulary")
    by_number: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    types = {number: _base_type(token) for number, token in by_number.items()}
    for entry in tokenizer.get("added_tokens", ()):
        by_number[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry.get("special") else USER_DEFINED
    if max(by_number) >= MAX_TOKENS:
        raise ValueError("more tokens than any model has")
    count = max(max(by_number) + 1, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens = [by_number.get(number, f"[PAD{number}]") for number in range(count)]
    described: dict[str, MetadataValue] = {
        "model": "gemma4",
        "tokens": tokens,
        "scores": [SCORE] * count,
        "token_type": [types.get(number, UNUSED) for number in range(count)],
        "merges": merges,
        **{
            f"{name}_token_id": tokens.index(token)
            for name, token in SPECIAL_TOKENS.items()
            if token in by_number.values()
        },
        "add_space_prefix": False,
        "add_bos_token": True,
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in described.items()}
    if not _is_described(tokenizer):
        found[ORIGINAL] = json.dumps(tokenizer, ensure_ascii=False)
    return found


def _base_type(token: str) -> int:
    if _BYTE.fullmatch(token):
        return BYTE
    return UNKNOWN if token == UNKNOWN_TOKEN else NORMAL


def _is_described(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the reader makes a tokenizer of the keys that splits every text alike."""
    model, split = tokenizer["model"], tokenizer.get("pre_tokenizer")
    settings = {key: model.get(key, default) for key, default in _DEFAULTS.items()}
    vocabulary, added = model["vocab"], tokenizer.get("added_tokens", ())
    return (
        settings == _MODEL
        and not (tokenizer.get("truncation") or tokenizer.get("padding"))
        and not any(" " in token for token in vocabulary)  # merges are written with one between their parts
        and model.get("unk_token") == (UNKNOWN_TOKEN if UNKNOWN_TOKEN in vocabulary else None)
        and tokenizer.get("normalizer") == _NORMALIZER
        # Splitting at spaces, of which the normalizer leaves none.
        and (split is None or (split.get("type") == "Split" and split.get("pattern") == {"String": " "}))
        and all(vocabulary.get(entry["content"]) == entry["id"] for entry in added)
        and not any(entry.get(flag) for entry in added for flag in _FLAGS)
    )
