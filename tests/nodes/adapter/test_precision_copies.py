"""Text encoders and VAEs in another precision: close to the given ones, which stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_text_encoders import PROMPT, SmallCLIP, SmallT5, detect_as, load_dense
from tiny import make_tiny_vae

ROUNDING = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.float() - reference).norm() / reference.norm()).item()


def encode(clip: Any) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)[0]


@pytest.fixture(params=["CLIP", "T5"])
def clip(request: Any, comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "CLIP":
        weights, kind = SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json"), "stable_diffusion"
    else:
        detect_as(comfy, monkeypatch, "T5_XXL")
        weights, kind = SmallT5(monkeypatch).weights(comfy, umt5=False), "sd3"
    save_file(weights, tmp_path / "encoder.safetensors")
    return load_dense(comfy, tmp_path / "encoder.safetensors", kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_encoders(dtype: str, clip: Any, model: Any) -> None:
    from snug.nodes.adapter.layerwise_casting import cast_clip
    from snug.nodes.adapter.precision_copies import set_clip_precision

    before = encode(clip)
    new = set_clip_precision(clip, dtype)
    packed = set_clip_precision(cast_clip(clip, "float8_e4m3fn per row", "default")[0], dtype)
    again = cast_clip(new, "float8_e4m3fn per row", "default")[0]
    lora = model.make_lora(packed.cond_stage_model, 1)
    for current, limit in ((new, ROUNDING[dtype]), (packed, 0.2), (again, 0.2)):
        inputs: set[torch.dtype] = set()
        linear = [m for m in current.cond_stage_model.modules() if hasattr(m, "out_features")]
        for layer in linear[:8]:
            layer.register_forward_pre_hook(lambda _, args, kept=inputs: kept.add(args[0].dtype))
        assert error(encode(current), before) < limit
        assert inputs == {DTYPES[dtype]}
        patched = current.clone()
        patched.add_patches(lora_patches(current, lora), 0.7)
        assert error(encode(patched), before) > 0.05
        assert error(encode(current), before) < limit
    assert torch.equal(encode(clip), before)
    twice = set_clip_precision(set_clip_precision(new, "bf16"), "fp32")
    assert error(encode(twice), before) < ROUNDING["fp32"]
    assert torch.equal(encode(set_clip_precision(clip, "auto")), before)


def lora_patches(clip: Any, lora: dict[str, torch.Tensor]) -> dict[str, Any]:
    import comfy.lora

    names = {key.rsplit(".lora_", 1)[0] for key in lora}
    return comfy.lora.load_lora(dict(lora), {name: f"{name}.weight" for name in names})


def small_autoencoder(comfy: Any) -> Any:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    sizes = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "resolution": 64}
    sizes |= {"double_z": True, "in_channels": 3, "out_ch": 3, "attn_resolutions": [], "dropout": 0.0}
    config = {"params": {"ddconfig": sizes, "embed_dim": 4}}
    torch.manual_seed(0)
    state = {
        name: torch.randn(value.shape) / max(1, value[0].numel() if value.dim() > 1 else 1) ** 0.5
        for name, value in AutoencoderKL(**config["params"]).state_dict().items()
    }
    return comfy.sd.VAE(sd=state, config=config)


def taesd(comfy: Any, folder: Path) -> Any:
    parts = {}
    for path in make_tiny_vae(folder, "taesd"):
        prefix = "taesd_" + path.stem.removeprefix("taesd_") + "."
        parts |= {prefix + name: value for name, value in load_file(path).items()}
    parts |= {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)}
    return comfy.sd.VAE(sd=parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["autoencoder", "taesd"])
def test_vaes(kind: str, dtype: str, comfy: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.precision_copies import set_vae_precision

    vae = small_autoencoder(comfy) if kind == "autoencoder" else taesd(comfy, tmp_path)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pixels = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(2))
    before = vae.decode(latent), vae.encode(pixels)
    tensors = {
        name: (value.dtype, value.data_ptr()) for name, value in vae.first_stage_model.named_parameters()
    }
    new = set_vae_precision(vae, dtype)
    inputs: set[torch.dtype] = set()
    for layer in new.first_stage_model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, args: inputs.add(args[0].dtype))
    for _ in range(2):
        for found, wanted in zip((new.decode(latent), new.encode(pixels)), before, strict=True):
            assert error(found, wanted) < ROUNDING[dtype]
        assert torch.equal(vae.decode(latent), before[0])
        assert torch.equal(vae.encode(pixels), before[1])
    assert inputs == {DTYPES[dtype]}
    if kind == "taesd":  # tiles are for a scale of 8
        assert error(new.decode_tiled(latent, tile_x=6, tile_y=6, overlap=1), before[0]) < 0.5
    assert tensors == {
        name: (value.dtype, value.data_ptr()) for name, value in vae.first_stage_model.named_parameters()
    }
