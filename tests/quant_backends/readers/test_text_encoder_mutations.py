"""Damaged text encoders, vision parts and vocabularies: FileFormatError or a result, nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from snug.quant_backends.core.errors import FileFormatError
from snug.quant_backends.readers import open_text_encoder_gguf, open_vision_gguf
from snug.quant_backends.readers.tokenizers import BUILDERS, needed_tokenizer
from text_encoder_files import write_mmproj, write_text_encoder

HEADER = 700  # most of the bytes before the data, in each of the files below


def add_vocabulary(writer: Any) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", "a", "b"])
    writer.add_token_scores([0.0] * 4 + [-1.0, -2.0])
    writer.add_token_types([3, 3, 3, 2, 1, 1])
    writer.add_unk_token_id(3)


def llama(path: Path) -> Path:
    block = "model.layers.0."
    weights = {
        "model.embed_tokens.weight": torch.zeros(6, 32),
        block + "self_attn.q_proj.weight": torch.zeros(32, 32),
        block + "self_attn.k_proj.weight": torch.zeros(16, 32),
        block + "input_layernorm.weight": torch.ones(32),
    }
    return write_text_encoder(path, weights, "llama", heads=(4, 2))


def gemma(path: Path) -> Path:
    weights = {
        "model.embed_tokens.weight": torch.zeros(6, 32),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32),
        "model.layers.0.input_layernorm.weight": torch.ones(32),
    }
    return write_text_encoder(path, weights, "gemma2", setup=add_vocabulary)


def vision(path: Path) -> Path:
    weights = {
        "patch_embed.proj.weight": torch.zeros(8, 3, 2, 2, 2),
        "blocks.0.attn.qkv.weight": torch.zeros(96, 32),
        "blocks.0.norm1.weight": torch.ones(32),
        "merger.mlp.2.weight": torch.zeros(16, 32),
    }
    return write_mmproj(path, weights, "qwen2.5vl_merger")


def use_text_encoder(path: Path) -> None:
    encoder = open_text_encoder_gguf(path)
    encoder.state_dict()
    key = needed_tokenizer(encoder)
    if key is not None:
        BUILDERS[key](path, encoder.metadata)


def use_vision(path: Path) -> None:
    open_vision_gguf(path).state_dict()


@pytest.mark.parametrize("make", [llama, gemma, vision])
def test_damaged_files(make: Any, tmp_path: Path) -> None:
    use = use_vision if make is vision else use_text_encoder
    content = make(tmp_path / "valid.gguf").read_bytes()
    use(tmp_path / "valid.gguf")
    dice = random.Random(make.__name__)
    refused = 0
    for number in range(2000):
        damaged = bytearray(content)
        for _ in range(dice.choice((1, 1, 2, 4))):
            place, size = dice.randrange(HEADER), dice.choice((1, 1, 4, 8))
            run = dice.choice((bytes(size), b"\xff" * size, dice.randbytes(size)))
            damaged[place : place + size] = run
            damaged[dice.randrange(HEADER)] ^= 1 << dice.randrange(8)
        path = tmp_path / f"{number}.gguf"  # never the same file twice: an older mapping must not change
        path.write_bytes(damaged)
        try:
            use(path)
        except FileFormatError:
            refused += 1
        path.unlink()
    assert 200 < refused < 2000
