"""LTX-2's text encoder at reduced size: a Gemma 3 12B and what lies between it and the diffusion model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_text_encoders import random_weights, tiny_sentencepiece

GEMMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
VISION = {
    "hidden_size": 64,
    "image_size": 56,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
WIDTH = 64
DIFFUSION = "model.diffusion_model."


@dataclass
class SmallLTX2:
    """gemma: text only, vision: its tower; spiece: the tokenizer. single, dual: the projections of LTX-2 (with
    connectors) and LTX-2.3, in bfloat16, as they are published."""

    gemma: dict[str, torch.Tensor]
    vision: dict[str, torch.Tensor]
    single: dict[str, torch.Tensor]
    dual: dict[str, torch.Tensor]
    spiece: Any

    def projection(self, kind: str) -> dict[str, torch.Tensor]:
        return dict(getattr(self, kind))


def small_ltx2(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> SmallLTX2:
    """Makes ComfyUI's classes small and its detection take every Gemma 3 for the 12B one; skips before LTX-2."""
    if "GEMMA_3_12B" not in comfy.sd.TEModel.__members__:
        pytest.skip("this ComfyUI does not know LTX-2")
    from comfy.ldm.lightricks.embeddings_connector import Embeddings1DConnector
    from comfy.text_encoders import llama, lt

    config = llama.Gemma3_12B_Config
    monkeypatch.setattr(llama, "Gemma3_12B_Config", lambda **options: config(**{**options, **GEMMA}))
    monkeypatch.setattr(config, "head_dim", 16)
    monkeypatch.setattr(config, "vision_config", {**config.vision_config, **VISION})
    monkeypatch.setattr(config, "mm_tokens_per_image", 4)
    original = comfy.sd.detect_te_model

    def detect(tensors: Any) -> Any:
        is_gemma = "model.layers.0.self_attn.q_norm.weight" in tensors
        return comfy.sd.TEModel.GEMMA_3_12B if is_gemma else original(tensors)

    monkeypatch.setattr(comfy.sd, "detect_te_model", detect)
    _narrow_connectors(monkeypatch, lt.LTXAVTEModel.load_sd, Embeddings1DConnector)
    operations = comfy.ops.manual_cast
    weights = random_weights(llama.Gemma3_12B({}, torch.float32, "meta", operations), "Q8_0")
    norms = [name for name in weights if name.endswith("norm.weight")]
    # One is added in GGUF files, which costs the last bits of other numbers.
    weights |= {name: (weights[name] * 16).round() / 64 for name in norms}
    gemma = {name: value for name, value in weights.items() if name.startswith("model.")}
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    columns = WIDTH * (GEMMA["num_hidden_layers"] + 1)
    connector = Embeddings1DConnector(dtype=torch.float32, device="meta", operations=operations)
    single = {"text_embedding_projection.aggregate_embed.weight": noise(WIDTH, columns) / columns**0.5}
    for seed, part in enumerate(("video", "audio")):
        found = random_weights(connector, "Q8_0", seed)
        single |= {f"{DIFFUSION}{part}_embeddings_connector.{name}": value for name, value in found.items()}
    dual = {}
    for part, rows in (("video", 96), ("audio", 32)):
        stem = f"text_embedding_projection.{part}_aggregate_embed"
        dual[f"{stem}.weight"] = noise(rows, columns) / columns**0.5
        dual[f"{stem}.bias"] = noise(rows)
    vision = {name: value for name, value in weights.items() if name not in gemma}
    projection = "multi_modal_projector.mm_input_projection_weight"
    vision[projection] = vision[projection].half().float()  # as converters store it
    single, dual = ({name: value.bfloat16() for name, value in part.items()} for part in (single, dual))
    return SmallLTX2(gemma, vision, single, dual, tiny_sentencepiece("bpe"))


def _narrow_connectors(monkeypatch: pytest.MonkeyPatch, load: Any, connector: Any) -> None:
    """Connectors have no configuration: their width is a number in ComfyUI's code and the defaults of their class."""
    code = load.__code__
    numbers = tuple(WIDTH if value == 3840 else value for value in code.co_consts)
    monkeypatch.setattr(load, "__code__", code.replace(co_consts=numbers))
    names = connector.__init__.__code__.co_varnames[1:]
    sizes = {"attention_head_dim": 16, "num_attention_heads": WIDTH // 16, "num_learnable_registers": 8}
    defaults = connector.__init__.__defaults__
    changed = tuple(sizes.get(name, value) for name, value in zip(names, defaults, strict=False))
    monkeypatch.setattr(connector.__init__, "__defaults__", changed)


def save(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, path)
    return path
