"""Damaged text encoders, vision parts and vocabularies: FileFormatError or a result, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import DAMAGES, Damage, check_damaged_files, truncations
from safetensors.torch import save_file
from snug.quant_backends.readers import (
    open_text_encoder_gguf,
    open_text_encoder_safetensors,
    open_vision_gguf,
)
from snug.quant_backends.readers.tokenizers import BUILDERS, needed_tokenizer
from text_encoder_files import write_mmproj, write_text_encoder

Make = Callable[[Path], Path]
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


def quantized(path: Path) -> Path:
    """OpenCLIP's names; bitsandbytes' INT8, old scaled FP8 and plain halves in one file."""
    block = "transformer.resblocks.0."
    tensors = {
        f"{block}attn.in_proj_weight": torch.zeros(24, 8),
        f"{block}ln_1.weight": torch.ones(8),
        f"{block}mlp.c_fc.weight": torch.zeros(8, 8, dtype=torch.int8),
        f"{block}mlp.c_fc.SCB": torch.ones(8),
        f"{block}mlp.c_proj.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn),
        f"{block}mlp.c_proj.scale_weight": torch.ones(1),
        "token_embedding.weight": torch.zeros(8, 8, dtype=torch.float16),
        "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, path)
    return path


def use_safetensors(path: Path) -> None:
    open_text_encoder_safetensors(path).state_dict()


USES: dict[Make, Callable[[Path], None]] = {
    llama: use_text_encoder,
    gemma: use_text_encoder,
    vision: use_vision,
    quantized: use_safetensors,
}


@pytest.mark.parametrize("make", [llama, gemma, vision, quantized])
@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage is not truncations])
def test_damaged_files(damage: Damage, make: Make, tmp_path: Path) -> None:
    """Truncation is the file readers' own matter, and tested there."""
    use, ending = USES[make], ".safetensors" if make is quantized else ".gguf"
    valid = make(tmp_path / f"valid{ending}")
    use(valid)
    content = valid.read_bytes()
    check_damaged_files(damage, (content, min(HEADER, len(content))), tmp_path, ending, use)
