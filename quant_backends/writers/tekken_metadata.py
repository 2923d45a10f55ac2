"""Mistral's tokenizer as metadata of a GGUF file, as llama.cpp's converter writes it: the way back of
`readers.tekken_model`.

It comes as mistral-common's tekken.json or as Hugging Face's tokenizer.json. Both are byte-pair encoding of bytes: the
tokens behind the special ones are merged in the order of their numbers.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import SnugError
from ..readers.gguf_vocabulary import CONTROL, MAX_TOKENS, NORMAL, UNUSED
from ..readers.tekken_model import byte_of_character

if TYPE_CHECKING:
    from .gguf_file import MetadataValue

SPECIAL_TOKENS = {"bos": "<s>", "eos": "</s>", "unknown": "<unk>", "padding": "<pad>"}


def tekken_metadata(tokenizer: Mapping[str, Any], rows: int) -> dict[str, MetadataValue]:
    """tokenizer: the parsed JSON. rows: of the embedding table, to which unused tokens are added.

    Raises SnugError when it is no such tokenizer, or a damaged one.
    """
    try:
        specials, ordinary = _hugging_face(tokenizer) if "model" in tokenizer else _tekken(tokenizer)
        merges = _merges(ordinary)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, binascii.Error) as error:
        raise SnugError("The tokenizer is no tekken vocabulary of Mistral's, or a damaged one.") from error
    characters = {value: character for character, value in byte_of_character().items()}

    def spelled(token: bytes) -> str:
        return "".join(characters[value] for value in token)

    count = len(specials)
    # Numbers between special tokens that have none: tokens that no text is split into.
    names = [f"<SPECIAL_{number}>" if name is None else name for number, name in enumerate(specials)]
    tokens = [*names, *map(spelled, ordinary)]
    missing = range(len(tokens), rows)
    types = [UNUSED if name is None else CONTROL for name in specials]
    described: dict[str, MetadataValue] = {
        "model": "gpt2",
        "pre": "tekken",
        "merges": [f"{spelled(left)} {spelled(right)}" for left, right in merges],
        "tokens": [*tokens, *(f"[PAD{number}]" for number in missing)],
        "scores": [0.0] * max(len(tokens), rows),
        "token_type": [*types, *[NORMAL] * (len(tokens) - count), *[UNUSED] * len(missing)],
        **{
            f"{name}_token_id": specials.index(token)
            for name, token in SPECIAL_TOKENS.items()
            if token in specials
        },
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in described.items()}


def _tekken(tokenizer: Mapping[str, Any]) -> tuple[list[str | None], list[bytes]]:
    """(special tokens, None for numbers that have none; the bytes of the others), in order."""
    config = tokenizer["config"]
    count, size = _number(config["default_num_special_tokens"]), _number(config["default_vocab_size"])
    specials: list[str | None] = [None] * count
    for entry in tokenizer["special_tokens"]:
        text = entry.get("token_str")
        specials[_number(entry["rank"])] = (
            text if text is not None else base64.b64decode(entry["token_bytes"]).decode()
        )
    # The published vocabulary is larger than the model: what lies behind its end is never used.
    ranks = {
        _number(entry["rank"]): base64.b64decode(entry["token_bytes"], validate=True)
        for entry in tokenizer["vocab"]
    }
    ordinary = [ranks[rank] for rank in range(min(len(ranks), size - count))]
    return specials, ordinary


def _hugging_face(tokenizer: Mapping[str, Any]) -> tuple[list[str | None], list[bytes]]:
    """The same, of a tokenizer.json."""
    by_number = {_number(number): token for token, number in tokenizer["model"]["vocab"].items()}
    added = {_number(entry["id"]): entry["content"] for entry in tokenizer["added_tokens"]}
    count = max(added) + 1
    table = byte_of_character()
    ordinary = [
        bytes(table[character] for character in by_number[number])
        for number in range(count, max(by_number) + 1)
    ]
    return [added.get(number) for number in range(count)], ordinary


def _number(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < MAX_TOKENS:
        raise ValueError("no number of a token")
    return value


def _merges(ordinary: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair that makes a token, in the order of the tokens; of one token's, those of earlier parts first."""
    ranks = {token: rank for rank, token in enumerate(ordinary)}
    if (
        len(ranks) != len(ordinary)
        or b"" in ranks
        or any(bytes([value]) not in ranks for value in range(256))
    ):
        raise ValueError("no vocabulary of bytes")
    merges = []
    for token in ordinary:
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = [(ranks[left], ranks[right]) for left, right in pairs if left in ranks and right in ranks]
        merges += [(ordinary[left], ordinary[right]) for left, right in sorted(found)]
    return merges
