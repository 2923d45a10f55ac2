"""Each repair on the shapes and names that its writer produces."""

from __future__ import annotations

from typing import Literal

import pytest
from snug.quant_backends.readers.repairs import (
    diffusion_names,
    drop_conv_ones,
    rename_qk_norms,
    restore_leading_ones,
    unfold_conv3d,
)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (["double_blocks.0.w", "img_in.bias"], ["double_blocks.0.w", "img_in.bias"]),
        (["model.diffusion_model.out.2.weight"], ["out.2.weight"]),
        (["model.double_layers.0.w", "model.register_tokens"], ["double_layers.0.w", "register_tokens"]),
        (["net.blocks.0.w"], ["blocks.0.w"]),
        # stable-diffusion.cpp: everything in one file
        (
            [
                "model.diffusion_model.input_blocks.0.0.weight",
                "first_stage_model.decoder.conv_in.weight",
                "cond_stage_model.transformer.text_model.embeddings.w",
                "conditioner.embedders.0.w",
                "text_encoders.t5xxl.transformer.shared.weight",
                "alphas_cumprod",
                "denoiser.sigmas",
            ],
            ["input_blocks.0.0.weight"],
        ),
        (["model.blocks.0.w", "first_stage_model.encoder.conv_in.weight"], ["blocks.0.w"]),
        (["blocks.0.w", "vae.decoder.conv_in.weight"], ["blocks.0.w"]),
        # A prefix that only some tensors have is part of their names.
        (["net.0.weight", "head.weight"], ["net.0.weight", "head.weight"]),
    ],
)
def test_prefixes(stored: list[str], expected: list[str]) -> None:
    names = diffusion_names(stored)
    assert list(names) == expected
    assert all(source in stored and source.endswith(name) for name, source in names.items())


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("pos_embed", (36864, 1536), (1, 36864, 1536)),
        ("pos_embed", (1, 36864, 1536), (1, 36864, 1536)),
        ("positional_encoding", (4096, 3072), (1, 4096, 3072)),
        ("register_tokens", (8, 3072), (1, 8, 3072)),
        ("blocks.11.modulation", (6, 1536), (1, 6, 1536)),
        ("vace_blocks.3.modulation", (6, 1536), (1, 6, 1536)),
        ("casual_audio_encoder.weights", (25, 1, 1), (1, 25, 1, 1)),
        ("motion_encoder.enc.net_app.convs.0.1.bias", (32, 1, 1), (1, 32, 1, 1)),
        ("motion_encoder.enc.fc.0.bias", (512,), (512,)),
        ("head.modulation", (2, 1536), (1, 2, 1536)),
        ("img_emb.emb_pos", (514, 1280), (1, 514, 1280)),
        ("x_pad_token", (3840,), (1, 3840)),
        ("cap_pad_token", (3840,), (1, 3840)),
        ("cap_pad_token", (1, 3840), (1, 3840)),
        ("siglip_pad_token", (3840,), (1, 3840)),
        ("keyframes_abs_pos_embedding", (4096,), (1, 4096)),
        ("face_adapter.encoder.padding_tokens", (5120,), (1, 1, 1, 5120)),
        ("txtfusion.projector.weight", (12,), (1, 12)),
        # Two-dimensional in their models.
        ("transformer_blocks.0.scale_shift_table", (6, 2048), (6, 2048)),
        ("pos_embedder.pos_emb_h", (128, 4096), (128, 4096)),
        # Other parameters that only sound alike.
        ("pos_embed.proj.weight", (1152, 64), (1152, 64)),
        ("blocks.0.modulation.lin.weight", (18, 6), (18, 6)),
        ("img2shape.blocks.0.modulation", (9216,), (9216,)),
    ],
)
def test_leading_ones(name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> None:
    shapes = {name: stored}
    restore_leading_ones(shapes)
    assert shapes == {name: expected}


@pytest.mark.parametrize(
    ("name", "stored", "out", "expected"),
    [
        ("patch_embedding.weight", (5120 * 16, 1, 2, 2), 5120, (5120, 16, 1, 2, 2)),
        ("vace_patch_embedding.weight", (1536 * 96, 1, 2, 2), 1536, (1536, 96, 1, 2, 2)),
        ("patch_embedding_pose.weight", (64 * 16, 1, 2, 2), 64, (64, 16, 1, 2, 2)),
        ("cond_encoder.weight", (64 * 16, 1, 2, 2), 64, (64, 16, 1, 2, 2)),
        ("frame_packer.proj_4x.weight", (64 * 16, 4, 8, 8), 64, (64, 16, 4, 8, 8)),
        ("img_in.proj.weight", (3072 * 16, 1, 2, 2), 3072, (3072, 16, 1, 2, 2)),
        ("img_in.proj.weight", (3584, 64, 1, 1), 3584, (3584, 64, 1, 1)),  # HunyuanImage is 2-D
        ("patch_embedding.weight", (5120, 16, 1, 2, 2), 5120, (5120, 16, 1, 2, 2)),
        ("patch_embedding.weight", (100, 1, 2, 2), 30, (100, 1, 2, 2)),
        ("x_embedder.proj.weight", (3072, 16, 2, 2), 1536, (3072, 16, 2, 2)),
    ],
)
def test_folded_conv3d(name: str, stored: tuple[int, ...], out: int, expected: tuple[int, ...]) -> None:
    shapes = {name: stored, name.replace("weight", "bias"): (out,)}
    unfold_conv3d(shapes)
    assert shapes[name] == expected


def test_conv3d_without_bias_stays() -> None:
    shapes = {"patch_embedding.weight": (32, 1, 2, 2)}
    unfold_conv3d(shapes)
    assert shapes["patch_embedding.weight"] == (32, 1, 2, 2)


@pytest.mark.parametrize(
    ("context", "expected"), [(768, (320, 320, 1, 1)), (1024, (320, 320)), (2048, (320, 320))]
)
def test_unet_projections(context: int, expected: tuple[int, ...]) -> None:
    block = "input_blocks.1.1"
    shapes = {
        f"{block}.proj_in.weight": (320, 320, 1, 1),
        f"{block}.proj_out.weight": (320, 320, 1, 1),
        f"{block}.transformer_blocks.0.attn2.to_k.weight": (320, context),
        "input_blocks.3.0.skip_connection.weight": (640, 320, 1, 1),
    }
    drop_conv_ones(shapes)
    assert shapes[f"{block}.proj_in.weight"] == shapes[f"{block}.proj_out.weight"] == expected
    assert shapes["input_blocks.3.0.skip_connection.weight"] == (640, 320, 1, 1)


def test_projections_of_other_models_stay() -> None:
    shapes = {"blocks.0.proj_out.weight": (8, 8, 1, 1)}
    drop_conv_ones(shapes)
    assert shapes == {"blocks.0.proj_out.weight": (8, 8, 1, 1)}


@pytest.mark.parametrize("parameter", ["scale", "weight"])
@pytest.mark.parametrize("stored", ["scale", "weight"])
def test_qk_norms(stored: str, parameter: Literal["scale", "weight"]) -> None:
    norms = [
        "double_blocks.0.img_attn.norm.query_norm",
        "double_blocks.0.txt_attn.norm.key_norm",
        "single_blocks.37.norm.key_norm",
    ]
    # Kandinsky 5 and Chroma use such names for other modules, which keep theirs.
    others = [
        "blocks.0.attention.query_norm.weight",
        "distilled_guidance_layer.norms.0.scale",
        "img_in.weight",
    ]
    tensors = {f"{name}.{stored}": index for index, name in enumerate(norms)} | dict.fromkeys(others, -1)
    renamed = rename_qk_norms(tensors, parameter)
    assert renamed == {f"{name}.{parameter}": index for index, name in enumerate(norms)} | dict.fromkeys(
        others, -1
    )
    assert list(renamed.values()) == list(tensors.values())
