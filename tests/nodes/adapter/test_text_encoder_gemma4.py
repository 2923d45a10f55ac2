"""Gemma 4 from a GGUF file: conditioning as from the dense file, token ids of 200 prompts as the original tokenizer's.

Sizes are reduced and detection is told the kind; the vocabulary is trained here (tests/support/vocabularies.py).
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_families import GEMMA4_SIZES
from prompts import PROMPTS
from safetensors.torch import save_file
from small_text_encoders import detect_as, encode, load_dense, load_packed, random_weights
from snug.quant_backends.core.errors import SnugError
from text_encoder_files import write_text_encoder
from vocabularies import gemma4, write_gemma4

ROWS = 6400
SIZES = {**GEMMA4_SIZES, "vocab_size": ROWS}


@pytest.fixture
def files(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """(GGUF, dense twin) of a small Gemma 4 E4B."""
    module = pytest.importorskip("comfy.text_encoders.gemma4", reason="this ComfyUI does not know Gemma 4")
    config = module.Gemma4Config
    defaults = tuple(SIZES.get(field.name, field.default) for field in fields(config))
    monkeypatch.setattr(config.__init__, "__defaults__", defaults)
    monkeypatch.setattr(config, "vision_config", {**config.vision_config, "num_hidden_layers": 1})
    monkeypatch.setattr(config, "audio_config", {**config.audio_config, "num_hidden_layers": 1})
    detect_as(comfy, monkeypatch, "GEMMA_4_E4B")
    model = module.Gemma4_E4B({}, torch.float32, "meta", comfy.ops.manual_cast)
    weights = {n: t for n, t in random_weights(model, "Q8_0").items() if n.startswith("model.")}
    for name in weights:
        if name.endswith("layer_scalar"):
            weights[name] = weights[name].abs() + 0.5
    text = json.dumps(gemma4(), ensure_ascii=False).encode()
    dense = tmp_path / "dense.safetensors"
    save_file({**weights, "tokenizer_json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, dense)
    stored = {f"{n}.weight" if n.endswith("layer_scalar") else n: t for n, t in weights.items()}
    path = write_text_encoder(
        tmp_path / "gemma4.gguf", stored, "gemma4", setup=lambda writer: write_gemma4(writer, ROWS)
    )
    return path, dense


def test_conditioning_and_tokens(files: tuple[Path, Path], comfy: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    packed = load_packed(files[0], "stable_diffusion")
    reference = load_dense(comfy, files[1], "stable_diffusion")
    original = tokenizers.Tokenizer.from_str(json.dumps(gemma4()))
    for prompt in PROMPTS:
        found = packed.tokenize(prompt)
        assert found == reference.tokenize(prompt), prompt
        ids = packed.tokenizer.gemma4.tokenizer(prompt)["input_ids"]
        assert ids == original.encode(prompt, add_special_tokens=False).ids, prompt
    wanted = encode(reference, PROMPTS[0])
    assert wanted.isfinite().all() and wanted.std() > 0.01
    torch.testing.assert_close(encode(packed, PROMPTS[0]), wanted, rtol=1e-3, atol=1e-3)


def test_images_and_sound_are_refused(files: tuple[Path, Path]) -> None:
    """By its towers, which the file has no weights for (ComfyUI finds the places of images by published ids)."""
    transformer = load_packed(files[0], "stable_diffusion").cond_stage_model.gemma4.transformer
    for tower in (transformer.vision_model, transformer.audio_model):
        with pytest.raises(SnugError, match="loaded without its vision part"):
            tower(torch.zeros(1))
