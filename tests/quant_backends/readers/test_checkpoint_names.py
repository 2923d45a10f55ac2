"""Where the text encoders of a checkpoint go, by whoever named them."""

from __future__ import annotations

import pytest
from snug.quant_backends.readers.checkpoint_names import (
    encoder_groups,
    encoder_kind,
    encoder_places,
    placed_name,
)

TOKENS = "text_model.embeddings.token_embedding.weight"
UNET = ["input_blocks.0.0.weight"]
T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    "stored,prefix,inner",
    [
        (f"cond_stage_model.transformer.{TOKENS}", "cond_stage_model", TOKENS),
        ("cond_stage_model.transformer.embeddings.token_embedding.weight", "cond_stage_model", TOKENS),
        (f"cond_stage_model.1.transformer.{TOKENS}", "cond_stage_model.1", TOKENS),
        (
            "conditioner.embedders.1.model.transformer.resblocks.0.ln_1.bias",
            "conditioner.embedders.1",
            "transformer.resblocks.0.ln_1.bias",
        ),
        (f"text_encoders.t5xxl.transformer.{T5}", "text_encoders.t5xxl", T5),
        ("text_encoders.t5xxl.transformer.enc.blk.0.attn_q.weight", "text_encoders.t5xxl", T5),
        ("text_encoders.t5xxl.transformer.token_embd.weight", "text_encoders.t5xxl", "shared.weight"),
        (
            "text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj.weight",
            "text_encoders.qwen25_7b",
            "model.layers.0.mlp.up_proj.weight",
        ),
        ("text_encoders.umt5xxl.spiece_model", "text_encoders.umt5xxl", "spiece_model"),
        (f"te3.{T5}", "te3", T5),
        (f"clip_l.{TOKENS}", "clip_l", TOKENS),
    ],
)
def test_groups(stored: str, prefix: str, inner: str) -> None:
    assert encoder_groups([stored, "model.diffusion_model.x.weight", "v_pred", "vae.decoder.x"]) == {
        prefix: {inner: stored}
    }


def test_kinds() -> None:
    for width, kind in ((768, "clip_l"), (1024, "clip_h"), (1280, "clip_g"), (512, None)):
        assert encoder_kind({TOKENS: (49408, width)}) == kind
    assert encoder_kind({T5: (4096, 4096)}) == "t5xxl"
    assert encoder_kind({"model.layers.0.mlp.up_proj.weight": (8, 8)}) is None


def test_places() -> None:
    """comfy/supported_models.py: what process_clip_state_dict of each configuration looks for."""
    assert encoder_places({"te": "clip_l"}, UNET) == {"te": "cond_stage_model"}
    assert encoder_places({"cond_stage_model": "clip_h"}, UNET) == {
        "cond_stage_model": "cond_stage_model.model"
    }
    assert encoder_places({"cond_stage_model": "clip_l", "cond_stage_model.1": "clip_g"}, UNET) == {
        "cond_stage_model": "conditioner.embedders.0",
        "cond_stage_model.1": "conditioner.embedders.1.model",
    }
    assert encoder_places({"clip_g": "clip_g"}, UNET) == {"clip_g": "conditioner.embedders.0.model"}
    assert encoder_places({"te1": "clip_l", "te3": "t5xxl"}, ["double_blocks.0.x"]) == {
        "te1": "text_encoders.clip_l",
        "te3": "text_encoders.t5xxl",
    }
    kept = {"text_encoders.umt5xxl": "t5xxl", "conditioner.embedders.3": None}
    assert encoder_places(kept, ["blocks.0.x"]) == {name: name for name in kept}


def test_what_lies_beside_the_transformer() -> None:
    assert placed_name("text_encoders.umt5xxl", "spiece_model") == "text_encoders.umt5xxl.spiece_model"
    assert placed_name("text_encoders.clip_l", TOKENS) == f"text_encoders.clip_l.transformer.{TOKENS}"
