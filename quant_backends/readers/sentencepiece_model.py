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
from typing import Any

from ..core.errors import FileFormatError
from .gguf_values import Metadata, shown

# TrainerSpec.ModelType by `tokenizer.ggml.model`: T5's is a unigram model, "llama" is byte-pair encoding.
MODEL_TYPES = {"t5": 1, "llama": 2}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL_IDS = {
    "unk": "unknown_token_id",
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "padding_token_id",
}
HINT = "download a conversion of the model that keeps its tokenizer, or a .safetensors version"


def build_sentencepiece_model(path: Path, metadata: Metadata) -> bytes:
    """The serialized model. Raises FileFormatError when the file holds no such tokenizer, or a damaged one."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in MODEL_TYPES:
        raise FileFormatError(
            path,
            f"the tokenizer in the file is {shown(str(kind))}, expected {' or '.join(MODEL_TYPES)}",
            HINT,
        )
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    scores = metadata.get("tokenizer.ggml.scores", ())
    types = metadata.get("tokenizer.ggml.token_type", ())
    if not (isinstance(tokens, tuple) and isinstance(scores, tuple) and isinstance(types, tuple)):
        raise FileFormatError(path, "the vocabulary in the file is no list", HINT)
    if not len(tokens) == len(scores) == len(types) > 0:
        raise FileFormatError(
            path,
            f"the vocabulary has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types, "
            f"expected the same number of each",
            HINT,
        )
    ids = {
        name: number
        for name, key in SPECIAL_IDS.items()
        if 0 <= (number := metadata.integer(f"tokenizer.ggml.{key}", -1)) < len(tokens)
    }
    if "unk" not in ids and "<unk>" in tokens:
        ids["unk"] = tokens.index("<unk>")
    kinds = _piece_types(types, ids, is_bpe=kind == "llama")
    pieces = b"".join(map(_piece, tokens, scores, kinds))
    trainer = _trainer(MODEL_TYPES[str(kind)], tokens, ids, BYTE in kinds)
    return pieces + _message(2, trainer) + _message(3, _normalizer(metadata, bool(kind == "t5")))


def _piece_types(types: tuple[Any, ...], ids: dict[str, int], is_bpe: bool) -> list[int]:
    """Types as the original model has them.

    Gemma's tokenizer settings declare turn markers and the unknown token "special", and llama.cpp then writes
    CONTROL; in the original model the former are USER_DEFINED, found in the text, and one piece is UNKNOWN.
    """
    kinds = [int(kind) for kind in types]
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


def _trainer(model_type: int, tokens: tuple[Any, ...], ids: dict[str, int], byte_fallback: bool) -> bytes:
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
        normalizer += _message(2, bytes(int(value) & 255 for value in charsmap))  # type: ignore[arg-type]
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
