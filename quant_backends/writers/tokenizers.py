"""The tokenizer of a text encoder, in whatever form it comes, as metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from ..core.errors import SnugError
from ..readers.safetensors_file import strict_json
from .sentencepiece_metadata import sentencepiece_metadata
from .tekken_metadata import tekken_metadata
from .tokenizer_json_metadata import tokenizer_json_metadata

if TYPE_CHECKING:
    from .gguf_file import MetadataValue

Described: TypeAlias = "dict[str, MetadataValue]"

_OF_JSON: dict[str, Callable[[Any, int], Described]] = {
    "tekken_model": tekken_metadata,
    "tokenizer_json": tokenizer_json_metadata,
}
# By the name under which ComfyUI keeps the file in a state dict: what files are called that hold it.
TOKENIZER_FILES = {
    "spiece_model": ("spiece.model", "tokenizer.model"),
    "tekken_model": ("tekken.json", "tokenizer.json"),
    "tokenizer_json": ("tokenizer.json",),
}


def tokenizer_metadata(key: str, content: bytes, rows: int) -> Described:
    """key: of TOKENIZER_FILES. content: of the file. rows: of the embedding table.

    Raises SnugError when it is no such tokenizer, a damaged one, or one with more tokens than there are rows.
    """
    if key in _OF_JSON:
        try:
            parsed = strict_json(content)
        except ValueError as error:
            raise SnugError(f"The tokenizer is no valid JSON ({error}).") from error
        if not isinstance(parsed, dict):
            raise SnugError("The tokenizer is no JSON object.")
        described = _OF_JSON[key](parsed, rows)
    else:
        described = sentencepiece_metadata(content, rows)
    tokens: Any = described["tokenizer.ggml.tokens"]
    if len(tokens) > rows:
        raise SnugError(
            f"The tokenizer has {len(tokens)} tokens, the embedding table only {rows} rows; "
            f"it belongs to another model."
        )
    return described
