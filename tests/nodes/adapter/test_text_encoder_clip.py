"""CLIP-L, CLIP-G and CLIP-H under every name that their tensors have in files, against ComfyUI's own loader.

The models have all their layers and a narrow configuration; ComfyUI's detection is the real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from quantized_files import quantize_tensors
from safetensors.torch import save_file
from small_text_encoders import SmallCLIP, load_dense, load_packed
from text_encoder_files import add, finish

PROMPT = "a (red:1.3) fox under the moon"
# Kind: (ComfyUI's configuration, type)
CLIPS = {
    "CLIP_L": ("sd1_clip_config.json", "stable_diffusion"),
    "CLIP_G": ("clip_config_bigg.json", "stable_diffusion"),
    "CLIP_H": ("text_encoders/sd2_clip_config.json", "stable_diffusion"),
}
OPENCLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.": ".attn.",
}


def joined(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Query, key and value in one tensor; the projection as OpenCLIP multiplies with it."""
    found = {}
    for name, tensor in weights.items():
        if ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            found[name.replace(".q_proj.", ".in_proj.")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[name] = tensor
    projection = found.pop("text_projection.weight", None)
    return found if projection is None else found | {"text_projection": projection.T.contiguous()}


def openclip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in joined(weights).items():
        for old, new in OPENCLIP.items():
            name = name.replace(old, new)
        found[name.replace("in_proj.", "in_proj_")] = tensor
    return found


def under(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def stable_diffusion_cpp(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Its names (name_conversion.cpp): Hugging Face's with a prefix, but for the joined attention."""
    found = joined(weights)
    if "text_projection" in found:
        found["text_model.text_projection"] = found.pop("text_projection")
    return under("cond_stage_model.transformer.", found)


NAMINGS = {
    "hugging face": lambda weights: weights,
    "hugging face in a checkpoint": lambda weights: under("conditioner.embedders.0.transformer.", weights),
    "openclip": openclip,
    "openclip in a checkpoint": lambda weights: under("conditioner.embedders.1.model.", openclip(weights)),
    "stable-diffusion.cpp": stable_diffusion_cpp,
}


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], format: str) -> Path:
    writer = gguf.GGUFWriter(path, "clip")
    for name, tensor in tensors.items():
        add(writer, name, tensor, format)
    return finish(writer, path)


def both(clip: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)


def packed_formats(clip: Any) -> set[str]:
    from snug.nodes.adapter.packed_module import packed_modules

    return {module.weight.params.format for _, module in packed_modules(clip.cond_stage_model)}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", CLIPS)
def test_gguf(kind: str, naming: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, clip_type = CLIPS[kind]
    weights = SmallCLIP(comfy, monkeypatch).weights(config)
    dense = tmp_path / "dense.safetensors"
    save_file(weights, dense)
    path = write_gguf(tmp_path / "clip.gguf", NAMINGS[naming](weights), "Q8_0")
    reference, clip = load_dense(comfy, dense, clip_type), load_packed(path, clip_type)
    assert type(clip.cond_stage_model) is type(reference.cond_stage_model)
    assert "Q8_0" in packed_formats(clip)
    found, wanted = both(clip), both(reference)
    assert min(tensor.std() for tensor in wanted) > 0.01
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-3)
    # A transposed projection is quantized along its other side: the format's own error.
    assert (found[1] - wanted[1]).norm() < 0.01 * wanted[1].norm()


@pytest.mark.parametrize("clip_type", ["sdxl", "sd3"])
def test_pair_of_clips(clip_type: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from snug.nodes.adapter.text_encoders import load_text_encoders

    small = SmallCLIP(comfy, monkeypatch)
    dense, packed = [], []
    for seed, (kind, naming) in enumerate({"CLIP_L": "hugging face", "CLIP_G": "openclip"}.items()):
        weights = small.weights(CLIPS[kind][0], seed)
        dense.append(tmp_path / f"{kind}.safetensors")
        save_file(weights, dense[-1])
        packed.append(write_gguf(tmp_path / f"{kind}.gguf", NAMINGS[naming](weights), "F16"))
    wanted_type = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    reference = comfy.sd.load_clip(
        [str(path) for path in dense], clip_type=wanted_type, model_options={"dtype": torch.float32}
    )
    clip = load_text_encoders([str(path) for path in packed], clip_type)
    for found, wanted in zip(both(clip), both(reference), strict=True):
        assert wanted.std() > 0.01
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_openclip_names_in_quantized_safetensors(
    comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """bitsandbytes quantizes the Linear layers; the joined attention stays plain."""
    weights = SmallCLIP(comfy, monkeypatch).weights(CLIPS["CLIP_G"][0])
    paths = []
    for name, tensors in (("hf", weights), ("open", openclip(weights))):
        chosen = {key: value for key, value in tensors.items() if ".mlp." in key and key.endswith(".weight")}
        quantized, _ = quantize_tensors(chosen, "nf4")
        paths.append(tmp_path / f"{name}.safetensors")
        rest = {key: value for key, value in tensors.items() if key not in chosen}
        save_file({key: value.contiguous() for key, value in {**rest, **quantized}.items()}, paths[-1])
    wanted, found = (both(load_packed(path, "stable_diffusion")) for path in paths)
    assert wanted[0].std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
