"""What a text encoder's GGUF file needs beside its weights: its architecture, its sizes and its tokenizer."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..readers.diffusers_layout import CONFIG, MAX_CONFIG_BYTES
from ..readers.json_file import read_json_object
from ..readers.text_encoder_kinds import projection_names
from ..readers.text_encoder_tables import FAMILIES
from ..readers.tokenizers import tokenizer_key
from ..writers import text_encoder_architecture, tokenizer_metadata
from ..writers.gguf_file import MetadataValue
from ..writers.tokenizers import TOKENIZER_FILES
from .console import note
from .opening import OpenModel, Weight

CLIP, CLIP_NAMES = "clip", "text_model.encoder.layers."
# LTX-2's projection keeps the names that it has in the checkpoint.
LTX = "ltxv"
TABLES = ("shared.weight", "model.embed_tokens.weight")
# Of every text encoder with LLaMA's layers that ComfyUI knows; what files without a config.json are taken to have.
HEAD_SIZE = 128
MAX_TOKENIZER_BYTES = 256 << 20
UNUSED = "logit_scale"
_NESTED = re.compile(r"^model\.language_model\.")


@dataclass(frozen=True)
class EncoderFile:
    """architecture: llama.cpp's name, "clip" for CLIP's text models, "ltxv" for LTX-2's projection. metadata: sizes and
    tokenizer."""

    architecture: str
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


def add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="for a text encoder that goes into a .gguf file, where ComfyUI has no tokenizer for it: the "
        "tokenizer.model, spiece.model, tekken.json or tokenizer.json published with it (default: that in IN or beside "
        "it)",
    )


def encoder_file(model: OpenModel, source: str, tokenizer: str | None) -> EncoderFile:
    """tokenizer: a file to take it from, instead of looking for it.

    Raises SnugError for a text encoder that cannot be loaded from a GGUF file, and when the tokenizer is missing,
    damaged or of another model.
    """
    tensors = encoder_tensors(model.tensors)
    if projection_names(tensors):
        return EncoderFile(LTX)
    is_clip = any(name.startswith(CLIP_NAMES) for name in tensors)
    architecture = CLIP if is_clip else text_encoder_architecture(tensors)
    table = next((name for name in TABLES if name in tensors), None)
    if architecture is None or (table is None and not is_clip):
        raise SnugError(
            f"{source} is a text encoder of a kind that cannot be loaded from a GGUF file; choose a target that is "
            f"stored in .safetensors files, such as FP8 e4m3fn per row."
        )
    rows = tensors[table].shape[0] if table and tensors[table].shape else 0
    key = None if is_clip else tokenizer_key(FAMILIES[architecture], rows)
    if key is None and tokenizer is not None:
        raise SnugError(
            f"ComfyUI brings the tokenizer of this text encoder ({architecture}); leave --tokenizer out."
        )
    kept = dict(_kept(model, architecture))
    if not is_clip and FAMILIES[architecture].permuted:
        kept = {**_heads(tensors, source, architecture), **kept}
    if key is None or (tokenizer is None and "tokenizer.ggml.tokens" in kept):
        return EncoderFile(architecture, kept)
    return EncoderFile(architecture, {**kept, **_tokenizer(model, source, key, rows, tokenizer)})


def encoder_tensors(tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """Those of them that are weights, as ComfyUI names them: not the tokenizer, nor positions that count from zero."""
    return {
        _NESTED.sub("model.", name): value
        for name, value in tensors.items()
        if name != UNUSED and (isinstance(value, PackedTensor) or value.is_floating_point())
    }


def _kept(model: OpenModel, architecture: str) -> Iterator[tuple[str, MetadataValue]]:
    """What a GGUF file that is read says of sizes and tokenizer."""
    if model.contents.convention != "GGUF":
        return
    named = model.contents.metadata.get("general.architecture")
    for name, value in model.contents.metadata.items():
        prefix, _, rest = name.partition(".")
        if prefix not in ("tokenizer", named):
            continue
        if isinstance(value, tuple):
            if not value or isinstance(value[0], tuple):  # lists of lists are nothing that a converter writes
                continue
            if name == "tokenizer.ggml.precompiled_charsmap":
                value = bytes(number & 255 for number in value if isinstance(number, int))
        yield (f"{architecture}.{rest}" if prefix == named else name), value


def _heads(tensors: Mapping[str, Weight], source: str, architecture: str) -> dict[str, MetadataValue]:
    """How many heads the rows of query and key are ordered by."""
    folder = Path(source).parent
    config: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        found = read_json_object(folder / CONFIG, MAX_CONFIG_BYTES)
        config = found["text_config"] if isinstance(found.get("text_config"), dict) else found
    name_of_heads, heads = f"{architecture}.attention.head_count", {}
    settings = {
        "num_attention_heads": ("q", name_of_heads),
        "num_key_value_heads": ("k", f"{name_of_heads}_kv"),
    }
    for setting, (letter, name) in settings.items():
        ending = f".self_attn.{letter}_proj.weight"
        rows = next((value.shape[0] for key, value in tensors.items() if key.endswith(ending)), HEAD_SIZE)
        count = config.get(setting)
        heads[name] = count if isinstance(count, int) and count > 0 else max(1, int(rows) // HEAD_SIZE)
    return heads


def _tokenizer(
    model: OpenModel, source: str, key: str, rows: int, given: str | None
) -> dict[str, MetadataValue]:
    stored = model.tensors.get(key)
    if given is None and isinstance(stored, torch.Tensor) and stored.dtype == torch.uint8:
        return tokenizer_metadata(key, stored.contiguous().numpy().tobytes(), rows)
    path = Path(given) if given is not None else _beside(Path(source), key)
    if path is None:
        raise SnugError(
            f"ComfyUI has no tokenizer for this text encoder, so it belongs into the GGUF file, and none was found in "
            f"or beside {source}; pass --tokenizer FILE, the {' or '.join(TOKENIZER_FILES[key])} published with the "
            f"model."
        )
    if not path.is_file():
        raise SnugError(f"{path} is no file; pass the {' or '.join(TOKENIZER_FILES[key])} of the model.")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise SnugError(
            f"{path} has {path.stat().st_size} bytes, more than any tokenizer; choose another file."
        )
    note(f"tokenizer: {path}")
    try:
        return tokenizer_metadata(key, path.read_bytes(), rows)
    except SnugError as error:
        raise SnugError(f"{path}: {error} Expected is a {' or '.join(TOKENIZER_FILES[key])}.") from error


def _beside(source: Path, key: str) -> Path | None:
    """In the same folder, or where a pipeline of diffusers has it: "tokenizer_2" beside "text_encoder_2"."""
    folder = source.absolute().parent
    folders = [folder, folder.parent / folder.name.replace("text_encoder", "tokenizer")]
    paths = (place / name for place in folders for name in TOKENIZER_FILES[key])
    return next((path for path in paths if path.is_file()), None)
