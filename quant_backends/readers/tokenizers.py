"""Which text encoders need their tokenizer out of the file, and building it once per file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from .gguf_file import GGUFFile
from .sentencepiece_model import build_sentencepiece_model
from .tekken_model import build_tekken_model
from .text_encoder_gguf import TextEncoderGGUF
from .text_encoder_tables import FAMILIES, LLAMA_3_ROWS, T5_BUILT_IN_ROWS, T5_NAMES, Family
from .tokenizer_json import build_tokenizer_json

BUILDERS = {
    "spiece_model": build_sentencepiece_model,
    "tekken_model": build_tekken_model,
    "tokenizer_json": build_tokenizer_json,
}


def needed_tokenizer(encoder: TextEncoderGGUF) -> str | None:
    """The key under which ComfyUI expects this encoder's tokenizer, None when it brings its own."""
    family = encoder.family
    if family is not None and family.permuted:
        return "tekken_model" if encoder.metadata.get("tokenizer.ggml.pre") == "tekken" else None
    table = encoder.infos.get("shared.weight")
    return tokenizer_key(family, table.shape[0] if table is not None and table.shape else None)


def tokenizer_key(family: Family | None, rows: int | None) -> str | None:
    """The same by the family and the rows of the embedding table, None for those of a file in original names."""
    if family is not None and family.permuted:
        return None if rows in LLAMA_3_ROWS else "tekken_model"
    if family is not None and family.norm_shift:
        return "spiece_model"
    if family is FAMILIES["gemma4"]:
        return "tokenizer_json"
    is_t5 = family is None or family.names is T5_NAMES
    return "spiece_model" if is_t5 and rows is not None and (rows,) not in T5_BUILT_IN_ROWS else None


def tokenizer_tensor(encoder: TextEncoderGGUF, key: str) -> torch.Tensor:
    """The tokenizer as ComfyUI keeps it in a state dict: its file as uint8 [bytes].

    Reading a vocabulary takes up to a second, so results are kept until the file changes. Raises FileFormatError
    when the file has no tokenizer of that kind.
    """
    stat = encoder.path.stat()
    return _built(encoder.path, key, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _built(path: Path, key: str, _mtime: int, _size: int) -> torch.Tensor:
    with GGUFFile(path) as file:
        return torch.frombuffer(bytearray(BUILDERS[key](path, file.metadata)), dtype=torch.uint8)
