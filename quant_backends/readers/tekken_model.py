"""Build Mistral's tekken vocabulary again from a GGUF file: what ComfyUI looks for as `tekken_model`.

The JSON of mistral-common: `vocab` has the bytes of each ordinary token in base64 with its rank, counted
behind the special tokens, which come first.
"""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from pathlib import Path

from ..core.errors import FileFormatError
from .gguf_values import Metadata
from .gguf_vocabulary import HINT, NORMAL, UNUSED, read_vocabulary


def build_tekken_model(path: Path, metadata: Metadata) -> bytes:
    """The JSON as UTF-8. Raises FileFormatError when the file holds no such tokenizer."""
    _, tokens, types, _ = read_vocabulary(path, metadata, ("gpt2",), scored=False)
    if NORMAL not in types:
        raise FileFormatError(path, "the vocabulary has only special tokens", HINT)
    specials = types.index(NORMAL)
    try:
        vocabulary = [
            {"rank": rank, "token_bytes": base64.b64encode(_bytes(token)).decode(), "token_str": None}
            for rank, (token, kind) in enumerate(zip(tokens[specials:], types[specials:], strict=True))
            if kind != UNUSED
        ]
    except KeyError as error:
        raise FileFormatError(
            path, f"the vocabulary has the character {error.args[0]!r}, which stands for no byte", HINT
        ) from None
    config = {
        "num_vocab_tokens": len(vocabulary),
        "default_vocab_size": len(tokens),
        "default_num_special_tokens": specials,
    }
    special_tokens = [
        {"rank": rank, "token_str": token, "is_control": True}
        for rank, (token, kind) in enumerate(zip(tokens[:specials], types, strict=False))
        if kind != UNUSED
    ]
    return json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special_tokens}).encode()


def _bytes(token: str) -> bytes:
    table = byte_of_character()
    return bytes(table[character] for character in token)


@lru_cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: bytes that print stand for themselves, the others for the characters from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(value): value for value in printing}
    others = (value for value in range(256) if value not in printing)
    return table | {chr(256 + number): value for number, value in enumerate(others)}
