"""Small text encoders of every family that GGUF files hold, as dense CLIPs of ComfyUI's own loader.

Sizes are reduced by replacing ComfyUI's configurations by name; detection, which looks at full sizes, is told the kind.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_text_encoders import (
    SmallCLIP,
    SmallT5,
    detect_as,
    load_dense,
    random_weights,
    sizes,
    tiny_sentencepiece,
    with_tokenizer,
)
from vocabularies import gemma4, sentencepiece_model, tekken

SMALL_TOWER = {"num_layers": 2, "intermediate_size": 96, "num_heads": 4}
GEMMA4_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size_per_layer_input": 64,
    "num_kv_shared_layers": 3,
}


@dataclass(frozen=True)
class Family:
    """clip_type: ComfyUI's. model, config: names in its module `llama`. architecture: llama.cpp's. rows: of the
    vocabulary, 0 for that of the tokenizer that ComfyUI brings. layers: as many as its output is taken from."""

    clip_type: str
    architecture: str
    model: str = ""
    config: str = ""
    rows: int = 0
    layers: int = 4


FAMILIES = {
    "CLIP_L": Family("stable_diffusion", "clip"),
    "T5_XXL": Family("chroma", "t5encoder"),
    "UMT5_XXL": Family("wan", "t5encoder", rows=6200),
    "LLAMA3_8": Family("hidream", "llama", "Llama2", "Llama2Config", 128256),
    "QWEN3_4B": Family("lumina2", "qwen3", "Qwen3_4B", "Qwen3_4BConfig"),
    "QWEN25_3B": Family("omnigen2", "qwen2", "Qwen25_3B", "Qwen25_3BConfig"),
    "QWEN25_7B": Family("qwen_image", "qwen2vl", "Qwen25_7BVLI", "Qwen25_7BVLI_Config"),
    "QWEN3VL_4B": Family("stable_diffusion", "qwen3vl"),
    "GEMMA_2_2B": Family("lumina2", "gemma2", "Gemma2_2B", "Gemma2_2B_Config", 512),
    "GEMMA_3_4B": Family("lumina2", "gemma3", "Gemma3_4B", "Gemma3_4B_Config", 512),
    "GEMMA_4_E4B": Family("stable_diffusion", "gemma4", rows=6400),
    "MISTRAL3_24B": Family("flux2", "llama", "Mistral3Small24B", "Mistral3Small24BConfig", 6400, 31),
    "MINISTRAL_3_3B": Family("stable_diffusion", "llama", "Ministral3_3B", "Ministral3_3BConfig", 6400),
}


class Builder:
    """make(kind) is a dense CLIP of a family; skips where this ComfyUI does not know it."""

    def __init__(self, comfy: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.comfy, self.patch, self.folder = comfy, monkeypatch, folder

    def make(self, kind: str, rows: int = 0) -> Any:
        """rows: of the vocabulary, instead of all."""
        family = FAMILIES[kind]
        weights = self._weights(kind, family, rows)
        path = self.folder / f"{kind}.safetensors"
        save_file(weights, path)
        return load_dense(self.comfy, path, family.clip_type)

    def _weights(self, kind: str, family: Family, rows: int) -> dict[str, torch.Tensor]:
        if kind == "CLIP_L":
            # Rows of one group would be read as rows without groups, which is the same.
            shape = {**SmallCLIP.sizes, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4}
            shape |= {"vocab_size": rows} if rows else {}
            self.patch.setattr(SmallCLIP, "sizes", shape)
            return SmallCLIP(self.comfy, self.patch).weights("sd1_clip_config.json")
        if kind in ("T5_XXL", "UMT5_XXL"):
            return self._t5(kind == "UMT5_XXL", family, rows)
        self.needs(kind)
        detect_as(self.comfy, self.patch, kind)
        if kind == "QWEN3VL_4B":
            return self._qwen3vl(rows)
        if kind == "GEMMA_4_E4B":
            return self._gemma4(family)
        return self._language_model(kind, family, rows)

    def needs(self, kind: str) -> None:
        if kind not in self.comfy.sd.TEModel.__members__:
            pytest.skip(f"this ComfyUI does not know {kind}")
        if FAMILIES[kind].config.startswith("Mistral") or kind == "MINISTRAL_3_3B":
            pytest.importorskip(
                "comfy.text_encoders.bpe_tokenizer",
                reason="ComfyUI 0.3.75 cannot build Mistral's tokenizer with transformers 5",
            )
        folder = Path(self.comfy.sd.__file__).parent / "text_encoders" / "llama_tokenizer"
        if kind == "LLAMA3_8" and not (folder / "tokenizer.json").exists():
            pytest.skip("this ComfyUI has no llama_tokenizer")

    def _t5(self, is_umt5: bool, family: Family, rows: int) -> dict[str, torch.Tensor]:
        from snug.nodes.adapter import text_encoder_kinds

        shape = {"d_model": 256, "d_ff": 512, "d_kv": 64, "num_layers": 4}
        self.patch.setattr(SmallT5, "sizes", {**SmallT5.sizes, **shape})
        small = SmallT5(self.patch)
        small.vocab_size = rows or family.rows or small.vocab_size
        weights = small.weights(self.comfy, umt5=is_umt5)
        detect_as(self.comfy, self.patch, "T5_XXL")
        if not is_umt5:
            return weights
        self.patch.setitem(text_encoder_kinds.KINDS, "T5_XXL", ("UMT5-XXL", ("wan",)))
        return with_tokenizer(weights, sentencepiece_model("unigram"))

    def _language_model(self, kind: str, family: Family, rows: int) -> dict[str, torch.Tensor]:
        from comfy.text_encoders import llama, qwen_vl

        tower = qwen_vl.Qwen2VLVisionTransformer

        def build_tower(hidden_size: int, **options: Any) -> Any:
            return tower(hidden_size=128, **{**SMALL_TOWER, **options})

        self.patch.setattr(qwen_vl, "Qwen2VLVisionTransformer", build_tower)
        # What Mistral gives comes out of its 30th layer.
        shape = sizes(64 if family.layers > 4 else 256, family.layers)
        if rows or family.rows:
            shape["vocab_size"] = rows or family.rows
        config = getattr(llama, family.config)
        # Over what its loader asks for, which is the size of the vocabulary.
        self.patch.setattr(llama, family.config, lambda **options: config(**{**options, **shape}))
        module = getattr(llama, family.model)({}, torch.float32, "meta", self.comfy.ops.manual_cast)
        weights = random_weights(module, "Q8_0")
        if kind.startswith("GEMMA"):
            # One is added in files of theirs, which costs the last bits of other numbers.
            norms = [name for name in weights if name.endswith("norm.weight")]
            weights |= {name: (weights[name] * 16).round() / 64 for name in norms}
            return with_tokenizer(weights, tiny_sentencepiece("bpe"))
        if family.architecture == "llama" and kind != "LLAMA3_8":
            weights["tekken_model"] = as_tensor(tekken())
        return weights

    def _qwen3vl(self, rows: int) -> dict[str, torch.Tensor]:
        from comfy.text_encoders import qwen3vl

        shape = {**sizes(256), **({"vocab_size": rows} if rows else {})}
        self.patch.setitem(
            qwen3vl.QWEN3VL_CONFIGS, "qwen3vl_4b", functools.partial(qwen3vl.Qwen3VL_4BConfig, **shape)
        )
        self.patch.setitem(
            qwen3vl.QWEN3VL_VISION,
            "qwen3vl_4b",
            {"hidden_size": 128, "intermediate_size": 96, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
        )
        self.patch.setitem(qwen3vl.QWEN3VL_VISION_COMMON, "num_heads", 4)

        class Small(qwen3vl.Qwen3VL):
            model_type = "qwen3vl_4b"

        weights = random_weights(Small({}, torch.float32, "meta", self.comfy.ops.manual_cast), "Q8_0")
        return {
            f"model.{name}" if name.startswith("visual.") else name: value for name, value in weights.items()
        }

    def _gemma4(self, family: Family) -> dict[str, torch.Tensor]:
        from comfy.text_encoders import gemma4 as module

        config, given = module.Gemma4Config, {**GEMMA4_SIZES, "vocab_size": family.rows}
        defaults = tuple(given.get(field.name, field.default) for field in fields(config))
        self.patch.setattr(config.__init__, "__defaults__", defaults)
        for part in ("vision_config", "audio_config"):
            self.patch.setattr(config, part, {**getattr(config, part), "num_hidden_layers": 1})
        model = module.Gemma4_E4B({}, torch.float32, "meta", self.comfy.ops.manual_cast)
        weights = random_weights(model, "Q8_0")
        for name in weights:
            if name.endswith("layer_scalar"):
                weights[name] = weights[name].abs() + 0.5
        return {**weights, "tokenizer_json": as_tensor(gemma4())}


def as_tensor(tokenizer: dict[str, Any]) -> torch.Tensor:
    """A tokenizer as ComfyUI's files hold it."""
    return torch.frombuffer(bytearray(json.dumps(tokenizer, ensure_ascii=False).encode()), dtype=torch.uint8)
