"""Build a SentencePiece model again from the vocabulary in a GGUF file.

UMT5 and the Gemmas come without their tokenizer in ComfyUI, which looks for the serialized model in the
checkpoint (`spiece_model`). llama.cpp's converters write every piece of it into the metadata, in order.

The result is a `ModelProto` (google/sentencepiece, sentencepiece_model.proto), written by hand: three message
types need no protobuf library. Field numbers::

    ModelProto      1 pieces, 2 trainer_spec, 3 normalizer_spec
    SentencePiece   1 piece, 2 score (float), 3 type
    TrainerSpec     3 model_type, 4 vocab_size, 35 byte_fallback, 40-43 ids and 45-48 pieces of unk, bos, eos, pad
    NormalizerSpec  1 name, 2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces
"""

from __future__ import annotations

import struct
from pathlib import Path

from .gguf_values import Metadata
from .gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_vocabulary

# TrainerSpec.ModelType by `tokenizer.ggml.model`: T5's is a unigram model, "llama" is byte-pair encoding.
MODEL_TYPES = {"t5": 1, "llama": 2}
# What a space is inside SentencePiece; llama.cpp writes user-defined pieces with a plain one.
SPACE = "\u2581"
SPECIAL_IDS = {
    "unk": "unknown_token_id",
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "padding_token_id",
}


def build_sentencepiece_model(path: Path, metadata: Metadata) -> bytes:
    """The serialized model. Raises FileFormatError when the file holds no such tokenizer, or a damaged one."""
    vocabulary = read_vocabulary(path, metadata, tuple(MODEL_TYPES), scored=True)
    tokens = vocabulary.tokens
    is_t5 = vocabulary.kind == "t5"
    ids = {
        name: number
        for name, key in SPECIAL_IDS.items()
        if 0 <= (number := metadata.integer(f"tokenizer.ggml.{key}", -1)) < len(tokens)
    }
    if "unk" not in ids and "<unk>" in tokens:
        ids["unk"] = tokens.index("<unk>")
    types = _piece_types(vocabulary.types, ids, is_bpe=not is_t5)
    texts = [
        text.replace(" ", SPACE) if kind == USER_DEFINED else text
        for text, kind in zip(tokens, types, strict=True)
    ]
    pieces = b"".join(map(_piece, texts, vocabulary.scores, types))
    trainer = _trainer(MODEL_TYPES[vocabulary.kind], tokens, ids, BYTE in types)
    return pieces + _message(2, trainer) + _message(3, _normalizer(metadata, is_t5))


def _piece_types(types: tuple[int, ...], ids: dict[str, int], is_bpe: bool) -> list[int]:
    """Types as the original model has them.

    Gemma's tokenizer settings declare turn markers and the unknown token "special", and llama.cpp then writes
    CONTROL; in the original model the former are USER_DEFINED, found in the text, and one piece is UNKNOWN.
    """
    kinds = list(types)
    if is_bpe:
        special = set(ids.values())
        kinds = [
            USER_DEFINED if kind == CONTROL and number not in special else kind
            for number, kind in enumerate(kinds)
        ]
    if "unk" in ids:
        kinds = [NORMAL if kind == UNKNOWN else kind for kind in kinds]
        kinds[ids["unk"]] = UNKNOWN
    return kinds


def _trainer(model_type: int, tokens: tuple[str, ...], ids: dict[str, int], byte_fallback: bool) -> bytes:
    trainer = _number(3, model_type) + _number(4, len(tokens)) + _number(35, byte_fallback)
    for field, name in enumerate(SPECIAL_IDS):
        if name in ids:
            trainer += _number(40 + field, ids[name])
    for field, name in enumerate(SPECIAL_IDS):
        if name in ids:
            trainer += _message(45 + field, tokens[ids[name]].encode())
    return trainer


def _normalizer(metadata: Metadata, is_t5: bool) -> bytes:
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap", ())
    normalizer = _message(1, b"nmt_nfkc" if charsmap else b"identity")
    if isinstance(charsmap, tuple) and charsmap:
        normalizer += _message(2, bytes(value & 255 for value in charsmap if isinstance(value, int)))
    for field, key, default in ((3, "add_space_prefix", True), (4, "remove_extra_whitespaces", is_t5)):
        normalizer += _number(field, bool(metadata.get(f"tokenizer.ggml.{key}", default)))
    return normalizer


def _piece(token: str, score: float, kind: int) -> bytes:
    text = token.encode()
    body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
    return b"\x0a" + _varint(len(body)) + body


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    """Base 128, least significant group first; value >= 0."""
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    groups.append(value)
    return bytes(groups)
