"""A SentencePiece model as metadata of a GGUF file, under llama.cpp's keys.

The way back of `readers.sentencepiece_model`, which lists the field numbers of the `ModelProto`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..core.errors import SnugError
from ..readers.gguf_vocabulary import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from ..readers.sentencepiece_model import MODEL_TYPES, SPACE

if TYPE_CHECKING:
    from .gguf_file import MetadataValue

# Pieces that TrainerSpec names (its fields 46-48), and what they are called when it does not.
SPECIAL_PIECES = {"bos": (46, "<s>"), "eos": (47, "</s>"), "padding": (48, "<pad>")}
UNUSED_SCORE = -10000.0  # llama.cpp's, of the pieces that fill up the vocabulary
_SIZES = {1: 8, 5: 4}  # bytes of protobuf's wire types of fixed size

Field = int | bytes


def sentencepiece_metadata(model: bytes, rows: int) -> dict[str, MetadataValue]:
    """model: the serialized `ModelProto`. rows: of the embedding table, to which unused pieces are added.

    Raises SnugError when it is damaged, or has what the metadata cannot say, so that its tokens would be others.
    """
    try:
        return _metadata(model, rows)
    except (IndexError, UnicodeDecodeError, TypeError, struct.error) as error:
        raise SnugError("The tokenizer is no SentencePiece model, or a damaged one.") from error


def _metadata(model: bytes, rows: int) -> dict[str, MetadataValue]:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Field] = {}
    normalizer: dict[int, Field] = {}
    for number, value in _fields(model):
        if number == 1:
            pieces.append(_piece(value))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))
    kinds = {number: name for name, number in MODEL_TYPES.items()}
    wanted = trainer.get(3, 1)
    kind = kinds.get(wanted) if isinstance(wanted, int) else None
    tokens, types = [piece[0] for piece in pieces], [piece[2] for piece in pieces]
    special = _special_ids(trainer, tokens, types)
    exact = (
        kind is not None
        and types.count(UNKNOWN) == 1
        and not trainer.get(24, 0)  # treat_whitespace_as_suffix
        and bool(normalizer.get(5, 1))  # escape_whitespaces
        and not any(" " in token for token, found in zip(tokens, types, strict=True) if found == USER_DEFINED)
        # In byte-pair models the reader takes all other control pieces for user-defined ones, as Gemma's are.
        and (
            kind == "t5" or {n for n, found in enumerate(types) if found == CONTROL} <= set(special.values())
        )
    )
    if not exact or kind is None:
        raise SnugError(
            "The tokenizer is a SentencePiece model of a kind that GGUF's metadata cannot describe."
        )
    missing = range(len(tokens), rows)
    texts = [
        token.replace(SPACE, " ") if found == USER_DEFINED else token
        for token, found in zip(tokens, types, strict=True)
    ]
    charsmap = normalizer.get(2, b"")
    described: dict[str, MetadataValue] = {
        "model": kind,
        "tokens": [*texts, *(f"[PAD{number}]" for number in missing)],
        "scores": [*(piece[1] for piece in pieces), *(UNUSED_SCORE for _ in missing)],
        "token_type": [*types, *(UNUSED for _ in missing)],
        "add_space_prefix": bool(normalizer.get(3, 1)),
        "remove_extra_whitespaces": bool(normalizer.get(4, 1)),
        "unknown_token_id": types.index(UNKNOWN),
        **{f"{name}_token_id": number for name, number in special.items()},
    }
    if isinstance(charsmap, bytes) and charsmap:
        described["precompiled_charsmap"] = charsmap
    return {f"tokenizer.ggml.{key}": value for key, value in described.items()}


def _piece(message: Field) -> tuple[str, float, int]:
    """(text, score, type) of a SentencePiece message."""
    found = dict(_fields(message))
    text, score, kind = found.get(1, b""), found.get(2, bytes(4)), found.get(3, NORMAL)
    if isinstance(text, int) or isinstance(score, int) or not isinstance(kind, int):
        raise TypeError("no piece with its score and type")
    return text.decode(), struct.unpack("<f", score)[0], kind


def _special_ids(trainer: dict[int, Field], tokens: list[str], types: list[int]) -> dict[str, int]:
    """As SentencePiece finds them itself: by the piece, not by the id that was wished for in training."""
    ids = {}
    for name, (field, default) in SPECIAL_PIECES.items():
        named = trainer.get(field)
        piece = named.decode() if isinstance(named, bytes) else default
        number = tokens.index(piece) if piece in tokens else -1
        if number >= 0 and types[number] == CONTROL:
            ids[name] = number
    return ids


def _fields(message: Field) -> Iterator[tuple[int, Field]]:
    """(number, value) of every field of a protobuf message: numbers as int, everything else as its bytes."""
    if isinstance(message, int):
        raise TypeError("a number where a message belongs")
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag & 7 == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        size = _SIZES.get(tag & 7)
        if tag & 7 == 2:
            size, position = _varint(message, position)
        if size is None or position + size > len(message):
            raise IndexError("no field of a message")
        yield tag >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """(value, position behind it)"""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError("no number of 64 bits")
