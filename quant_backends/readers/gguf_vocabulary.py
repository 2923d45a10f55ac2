"""The vocabulary in a GGUF text encoder's metadata, checked."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeVar

from ..core.errors import FileFormatError
from .gguf_values import Metadata, shown

HINT = "download a conversion of the model that keeps its tokenizer, or a .safetensors version"
# Many times the tokens of any model; what a tokenizer's numbers are checked against before lists are made of them.
MAX_TOKENS = 1 << 22
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Logarithms of probabilities, or ranks; tokenizers keep them in float32, which metadata need not be.
MAX_SCORE = 1e38

Element = TypeVar("Element", str, int, float)


class Vocabulary(NamedTuple):
    """kind: `tokenizer.ggml.model`. Tokens with a type each; scores only where the kind has them."""

    kind: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]


def read_vocabulary(path: Path, metadata: Metadata, kinds: tuple[str, ...], scored: bool) -> Vocabulary:
    """Raises FileFormatError when the file holds no vocabulary of one of the `kinds`, or a damaged one."""
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in kinds:
        found = f"is {shown(kind)}" if isinstance(kind, str) else "is missing"
        raise FileFormatError(path, f"the tokenizer in the file {found}, expected {' or '.join(kinds)}", HINT)
    tokens = _column(path, metadata, "tokens", str)
    types = _column(path, metadata, "token_type", int)
    scores = _column(path, metadata, "scores", float) if scored else (0.0,) * len(tokens)
    if not len(tokens) == len(scores) == len(types) > 0:
        raise FileFormatError(
            path,
            f"the vocabulary has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types, "
            f"expected the same number of each",
            HINT,
        )
    if not all(abs(score) < MAX_SCORE for score in scores):
        raise FileFormatError(path, "the vocabulary has scores that are no ordinary numbers", HINT)
    if not all(0 < number <= BYTE for number in types):
        raise FileFormatError(path, f"the vocabulary has types outside of {NORMAL} to {BYTE}", HINT)
    return Vocabulary(kind, tokens, types, scores)


def _column(path: Path, metadata: Metadata, key: str, kind: type[Element]) -> tuple[Element, ...]:
    found = metadata.get(f"tokenizer.ggml.{key}", ())
    if not isinstance(found, tuple):
        found = ("",)
    values = tuple(value for value in found if isinstance(value, kind))
    if len(values) != len(found):
        raise FileFormatError(path, f"metadata 'tokenizer.ggml.{key}' is no list of {kind.__name__}", HINT)
    return values
