"""Small text encoders of the kinds that no GGUF files are made of for ComfyUI."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_families import as_tensor
from small_text_encoders import random_weights, sizes, tiny_sentencepiece, with_tokenizer
from text_encoder_files import snap
from vocabularies import gemma4

Weights = dict[str, torch.Tensor]
# Name: ComfyUI's kinds of its files, and the type to choose.
OTHERS: dict[str, tuple[tuple[str, ...], str]] = {
    "T5Gemma": (("T5_GEMMA",), "stable_audio"),
    "GPT-OSS": (("GPT_OSS_20B",), "lens"),
    "Qwen3.5": (("QWEN35_2B",), "stable_diffusion"),
    "Gemma 3 and Jina CLIP": (("GEMMA_3_4B", "JINA_CLIP_2"), "newbie"),
}
MUSIC = "MiniMax Music 3"  # calculates in bfloat16, and what comes out of it is drawn by chance


def make(name: str, comfy: Any, patch: pytest.MonkeyPatch) -> list[Weights]:
    """The weights of each file, ComfyUI's classes made small; skips where this ComfyUI does not know them."""
    kinds, clip_type = OTHERS[name]
    if not all(kind in comfy.sd.TEModel.__members__ for kind in kinds):
        pytest.skip(f"this ComfyUI does not know {name}")
    found = [_MAKERS[kind](comfy, patch) for kind in kinds]
    first_names = [set(weights) for weights in found]

    def detect(tensors: Any) -> Any:
        """By names alone, as ComfyUI's own looks at full sizes."""
        known = max(range(len(kinds)), key=lambda number: len(first_names[number] & set(tensors)))
        return comfy.sd.TEModel[kinds[known]]

    patch.setattr(comfy.sd, "detect_te_model", detect)
    return found


def _t5gemma(comfy: Any, patch: pytest.MonkeyPatch) -> Weights:
    from comfy.text_encoders import sa3

    class Config(sa3.T5GemmaEncoderConfig):
        def __init__(self) -> None:
            super().__init__()
            self.vocab_size, self.hidden_size, self.intermediate_size = 512, 128, 256
            self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads = 2, 4, 4
            self.head_dim = 32
            self.layer_types = self.layer_types[:2]

    patch.setattr(sa3, "T5GemmaEncoderConfig", Config)
    module = sa3.T5GemmaModel({}, torch.float32, "meta", comfy.ops.manual_cast)
    return with_tokenizer(random_weights(module, "Q8_0"), tiny_sentencepiece("bpe"))


def _jina(comfy: Any, patch: pytest.MonkeyPatch) -> Weights:
    from comfy.text_encoders import jina_clip_2

    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
    config = functools.partial(
        jina_clip_2.XLMRobertaConfig, **shape, num_hidden_layers=2, num_attention_heads=4
    )
    patch.setattr(jina_clip_2, "XLMRobertaConfig", config)
    module = jina_clip_2.XLMRobertaModel({}, torch.float32, "meta", comfy.ops.manual_cast)
    return with_tokenizer(random_weights(module, "Q8_0"), tiny_sentencepiece("bpe"))


def _gemma(comfy: Any, patch: pytest.MonkeyPatch) -> Weights:
    from comfy.text_encoders import llama

    shape, config = {**sizes(), "vocab_size": 512}, llama.Gemma3_4B_Config
    patch.setattr(llama, "Gemma3_4B_Config", lambda **options: config(**{**options, **shape}))
    module = llama.Gemma3_4B({}, torch.float32, "meta", comfy.ops.manual_cast)
    return with_tokenizer(random_weights(module, "Q8_0"), tiny_sentencepiece("bpe"))


def _gpt_oss(comfy: Any, patch: pytest.MonkeyPatch) -> Weights:
    from comfy.text_encoders import gpt_oss
    from snug.nodes.adapter.operations import build_operations

    config = functools.partial(
        gpt_oss.GptOss20BConfig,
        **{**sizes(128, 2, (4, 2)), "intermediate_size": 128, "vocab_size": 6400, "head_dim": 32},
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    patch.setattr(gpt_oss, "GptOss20BConfig", config)
    patch.setattr(gpt_oss, "LENS_SELECTED_LAYERS", (0, 1))
    # Layers of either operations make no weights before they load them, so that nothing says their shapes.
    operations = build_operations(None)  # pyright: ignore[reportArgumentType]
    module = gpt_oss.GptOssModel(config(), torch.device("meta"), torch.float32, operations)
    for layer in module.modules():
        if hasattr(layer, "_weight_shape") and layer.weight is None:
            layer.weight = torch.nn.Parameter(torch.empty(layer._weight_shape(), device="meta"))
            if isinstance(layer, torch.nn.Linear):
                layer.bias = torch.nn.Parameter(torch.empty(layer.out_features, device="meta"))
    weights = random_weights(module, "Q8_0")
    for name, value in weights.items():
        if value.dim() == 3:  # the experts
            weights[name] = snap(value.flatten(0, 1), "Q8_0").view_as(value)
    return {**weights, "tokenizer_json": as_tensor(gemma4())}


def _qwen35(comfy: Any, patch: pytest.MonkeyPatch) -> Weights:
    from comfy.text_encoders import qwen35
    from transformers import Qwen2Tokenizer

    class Tokenizer(qwen35.sd1_clip.SDTokenizer):
        """Of Qwen2.5: the other one's files are not in every copy of ComfyUI."""

        def __init__(
            self, embedding_directory: Any = None, tokenizer_data: Any = None, **options: Any
        ) -> None:
            folder = Path(qwen35.__file__).parent / "qwen25_tokenizer"
            super().__init__(
                str(folder),
                tokenizer_class=Qwen2Tokenizer,
                pad_with_end=False,
                has_start_token=False,
                has_end_token=False,
                pad_to_max_length=False,
                min_length=1,
                pad_token=151643,
                embedding_size=options["embedding_size"],
                embedding_key=options["embedding_key"],
            )

    patch.setattr(qwen35, "Qwen35Tokenizer", Tokenizer)
    shape = {**sizes(64, 4, (4, 2)), "vocab_size": 151936}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    vision = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "depth": 1}
    patch.setitem(qwen35.QWEN35_MODELS, "qwen35_2b", {**shape, **linear, "vision": vision})
    module = qwen35.Qwen35({}, torch.float32, "meta", comfy.ops.manual_cast)
    prefixes = {"model.": "model.language_model.", "visual.": "model.visual."}
    return {
        next(old + name.removeprefix(new) for new, old in prefixes.items() if name.startswith(new)): value
        for name, value in random_weights(module, "Q8_0").items()
    }


def make_music(comfy: Any, patch: pytest.MonkeyPatch) -> Weights:
    """As published: with the tables that it needs of its vocabulary, in bfloat16."""
    if "MINIMAX" not in comfy.sd.CLIPType.__members__:
        pytest.skip(f"this ComfyUI does not know {MUSIC}")
    from comfy.ldm.minimax_music.prompt import SPECIAL_TOKEN_IDS
    from comfy.text_encoders import minimax_music

    shape = {**sizes(64, 2, (4, 2)), "head_dim": 16, "decoder_num_heads": 4}
    shape |= {"decoder_intermediate_size": 64, "decoder_num_layers": 1, "audio_num_codebooks": 3}
    for key, value in shape.items():
        patch.setitem(minimax_music.MODEL_CONFIG, key, value)
    module = minimax_music.MiniMaxMusic3TEModel(
        device="meta", model_options={"custom_operations": comfy.ops.manual_cast}
    )
    del module.model.embed_tokens, module.model.lm_head
    weights = {name: value.bfloat16() for name, value in random_weights(module, "Q8_0").items()}
    vocabulary = {**SPECIAL_TOKEN_IDS, "?": 0}
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, number in SPECIAL_TOKEN_IDS.items()
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
    }
    return {**weights, "tokenizer_json": as_tensor(tokenizer)}


_MAKERS = {
    "T5_GEMMA": _t5gemma,
    "GPT_OSS_20B": _gpt_oss,
    "QWEN35_2B": _qwen35,
    "GEMMA_3_4B": _gemma,
    "JINA_CLIP_2": _jina,
}
