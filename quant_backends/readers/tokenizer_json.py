"""Build Gemma 4's tokenizer again from a GGUF file: what ComfyUI looks for as `tokenizer_json`.

The JSON of the tokenizers library. llama.cpp's converter (conversion/gemma.py, Gemma4Model.set_vocab) writes the
pieces with their ids, types and merges; what it leaves out is the same for every Gemma: spaces become U+2581, and
what has no piece is spelled in bytes. Files may hold the whole JSON beside that, as GGUF's specification offers.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..core.errors import FileFormatError
from .gguf_values import Metadata
from .gguf_vocabulary import CONTROL, HINT, UNUSED, USER_DEFINED, read_vocabulary

SPACE = "\u2581"
UNKNOWN_TOKEN = "<unk>"
ORIGINAL = "tokenizer.huggingface.json"


def build_tokenizer_json(path: Path, metadata: Metadata) -> bytes:
    """The JSON as UTF-8. Raises FileFormatError when the file holds no such tokenizer, or a damaged one."""
    original = metadata.get(ORIGINAL)
    if isinstance(original, str):
        return original.encode()
    vocabulary = read_vocabulary(path, metadata, ("gemma4",), scored=False)
    pieces = {
        token: number
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind != UNUSED
    }
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (CONTROL, USER_DEFINED) and token
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": UNKNOWN_TOKEN if UNKNOWN_TOKEN in pieces else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": pieces,
        "merges": _merges(path, metadata, pieces),
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": model,
    }
    return json.dumps(tokenizer, ensure_ascii=False).encode()


def _merges(path: Path, metadata: Metadata, pieces: dict[str, int]) -> list[list[str]]:
    found = metadata.get("tokenizer.ggml.merges")
    merges = found if isinstance(found, tuple) else ()
    pairs = [merge.split(" ") for merge in merges if isinstance(merge, str)]
    if not pairs or len(pairs) != len(merges):
        raise FileFormatError(path, "the vocabulary has no list of merges", HINT)
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= pieces.keys():
            raise FileFormatError(path, "the vocabulary has a merge of pieces that it does not have", HINT)
    return pairs
