"""Quantized all-in-one checkpoints give what the dense checkpoint of the same weights gives through core's loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    Tensors,
    clip_weights,
    diffusion_weights,
    openclip_names,
    prefixed,
    shrink_clip,
    snapped,
    taesd,
    write_sdcpp,
)
from fake_paging import load_dynamically
from narrow_models import accept_narrow_models
from quantized_files import dense_tensors, quantize_tensors
from safetensors.torch import save_file
from small_text_encoders import SmallT5

PROMPT = "a red fox under the moon"


@pytest.fixture(scope="module")
def load(comfy: Any) -> Iterator[Callable[..., Any]]:
    from snug.nodes.adapter.checkpoints import load_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        shrink_clip(patch)
        yield load_checkpoint


def load_dense(comfy: Any, path: Path) -> Any:
    return comfy.sd.load_checkpoint_guess_config(str(path), te_model_options={"dtype": torch.float32})[:3]


def outputs(loaded: Any, family: str, model: Any) -> list[torch.Tensor]:
    """Conditioning, pooled output, a denoising prediction and a decoded image."""
    patcher, clip, vae = loaded
    cond, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
    generator = torch.Generator().manual_seed(3)
    channels = patcher.model.latent_format.latent_channels
    latent = torch.randn(1, channels, 8, 8, generator=generator)
    sigma = patcher.model.model_sampling.sigma_max * torch.full((1,), 0.5)
    extra = (
        {}
        if family == "sd15"
        else {"y": torch.randn(1, 2816 if family == "sdxl" else 2048, generator=generator)}
    )
    predicted = patcher.model.apply_model(latent, sigma, c_crossattn=cond.float(), **extra)
    return [cond, pooled, predicted, vae.decode(latent)]


def check(found: Any, wanted: Any, family: str, model: Any, tolerance: float = 1e-3) -> None:
    for value, target in zip(outputs(found, family, model), outputs(wanted, family, model), strict=True):
        assert target.std() > 0.01
        assert model.relative_error(value, target) < tolerance


@pytest.fixture(scope="module")
def sd15_parts(load: Any, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """Under the names of the original checkpoints."""
    folder = tmp_path_factory.mktemp("sd15")
    clip = {
        name: value
        for name, value in clip_weights(comfyui_path, "clip_l").items()
        if "projection" not in name
    }
    return {
        **prefixed("model.diffusion_model.", diffusion_weights(folder, "sd15")),
        **prefixed("cond_stage_model.transformer.", clip),
        **prefixed("first_stage_model.", taesd(folder, "taesd")),
    }


@pytest.mark.parametrize("kind", ["nf4", "fp8", "torchao-int8"])
def test_quantized_safetensors(
    kind: str, sd15_parts: Tensors, load: Any, comfy: Any, model: Any, tmp_path: Path
) -> None:
    tensors, metadata = quantize_tensors({name: value.half() for name, value in sd15_parts.items()}, kind)
    path = tmp_path / "packed.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    save_file(dense_tensors(path), tmp_path / "dense.safetensors")
    found, dense = load(str(path), "fp32"), load_dense(comfy, tmp_path / "dense.safetensors")
    assert len([*model.packed_modules(found[0].model)]) > 20
    assert len([*model.packed_modules(found[1].cond_stage_model)]) > 10
    assert found[0].model_size() < 0.7 * dense[0].model_size()
    check(found, dense, "sd15", model)


def test_sd15_of_stable_diffusion_cpp(
    sd15_parts: Tensors, load: Any, comfy: Any, model: Any, tmp_path: Path
) -> None:
    path = write_sdcpp(tmp_path / "sd15.gguf", sd15_parts)
    save_file(snapped(sd15_parts, "Q8_0"), tmp_path / "dense.safetensors")
    check(load(str(path), "fp32"), load_dense(comfy, tmp_path / "dense.safetensors"), "sd15", model)


@pytest.mark.slow
def test_sdxl_of_stable_diffusion_cpp(
    load: Any, comfy: Any, comfyui_path: Path, model: Any, tmp_path: Path
) -> None:
    """Two encoders under its own names, the attention of CLIP-G in one tensor."""
    unet = prefixed("model.diffusion_model.", diffusion_weights(tmp_path, "sdxl"))
    vae = taesd(tmp_path, "taesdxl")
    clip_l = clip_weights(comfyui_path, "clip_l")
    clip_l.pop("text_projection.weight")
    openclip = openclip_names(clip_weights(comfyui_path, "clip_g"))
    dense = {
        **unet,
        **prefixed("conditioner.embedders.0.transformer.", clip_l),
        **prefixed("conditioner.embedders.1.model.", openclip),
        **prefixed("first_stage_model.", vae),
    }
    save_file(snapped(dense, "Q8_0"), tmp_path / "dense.safetensors")
    stored = {
        **unet,
        **prefixed("cond_stage_model.transformer.", clip_l),
        **prefixed("cond_stage_model.1.transformer.", renamed_by_sdcpp(openclip)),
        **prefixed("vae.", vae),
    }
    path = write_sdcpp(tmp_path / "sdxl.gguf", stored)
    found = load(str(path), "fp32")
    assert len([*model.packed_modules(found[1].cond_stage_model.clip_g)]) > 10
    check(found, load_dense(comfy, tmp_path / "dense.safetensors"), "sdxl", model)


def renamed_by_sdcpp(openclip: Tensors) -> Tensors:
    """Its convert_open_clip_to_hf_clip_name: `self_attn.in_proj` stays joined."""
    pairs = [
        ("transformer.resblocks.", "text_model.encoder.layers."),
        ("attn.in_proj_", "self_attn.in_proj."),
        (".attn.out_proj", ".self_attn.out_proj"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
        ("ln_final", "text_model.final_layer_norm"),
        ("token_embedding", "text_model.embeddings.token_embedding"),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("text_projection", "text_model.text_projection"),
    ]
    found = {}
    for name, value in openclip.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = value
    return found


def test_sd3_with_one_encoder(load: Any, comfy: Any, comfyui_path: Path, model: Any, tmp_path: Path) -> None:
    tensors = {
        **prefixed("model.diffusion_model.", diffusion_weights(tmp_path, "sd3")),
        **prefixed("text_encoders.clip_l.transformer.", clip_weights(comfyui_path, "clip_l")),
        **prefixed("first_stage_model.", taesd(tmp_path, "taesd3")),
    }
    save_file(snapped(tensors, "Q8_0"), tmp_path / "dense.safetensors")
    stored = {
        name.replace("first_stage_model.", "vae.").replace(
            "text_encoders.clip_l.transformer.", "clip_l."
        ): value
        for name, value in tensors.items()
    }
    path = write_sdcpp(tmp_path / "sd3.gguf", stored)
    check(load(str(path), "fp32"), load_dense(comfy, tmp_path / "dense.safetensors"), "sd3", model)


def test_flux_as_it_is_published(
    load: Any, comfy: Any, comfyui_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    """NF4 transformer, T5 in plain float8, CLIP-L in float16: every part keeps its own form."""
    t5 = SmallT5(monkeypatch).weights(comfy, umt5=False)
    t5 = {
        name: value.to(torch.float8_e4m3fn) if value.dim() == 2 else value.half()
        for name, value in t5.items()
    }
    clip = {
        n: value.half() for n, value in clip_weights(comfyui_path, "clip_l").items() if "projection" not in n
    }
    encoders = {
        **prefixed("text_encoders.t5xxl.transformer.", t5),
        **prefixed("text_encoders.clip_l.transformer.", clip),
    }
    flux = prefixed("model.diffusion_model.", diffusion_weights(tmp_path, "flux"))
    packed, metadata = quantize_tensors({name: value.half() for name, value in flux.items()}, "nf4")
    vae = prefixed("vae.", taesd(tmp_path, "taef1"))
    save_file({**packed, **encoders, **vae}, tmp_path / "nf4.safetensors", metadata=metadata)
    accept_narrow_models(monkeypatch)
    save_file(dense_tensors(tmp_path / "nf4.safetensors"), tmp_path / "dense.safetensors")
    found = load(str(tmp_path / "nf4.safetensors"))
    dense = load_dense(comfy, tmp_path / "dense.safetensors")
    assert formats(found[0].model, model) == {"bnb-nf4-64"}
    assert formats(found[1].cond_stage_model, model) == {"float8_e4m3fn-tensor", "F16"}
    conditionings = [
        clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True) for _, clip, _ in (found, dense)
    ]
    for value, target in zip(*conditionings, strict=True):
        assert model.relative_error(value, target) < 1e-3
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    images = [vae.decode(latent) for _, _, vae in (found, dense)]
    assert model.relative_error(*images) < 1e-3


def formats(network: torch.nn.Module, model: Any) -> set[str]:
    return {module.weight.params.format for _, module in model.packed_modules(network)}


def test_plain_files_go_to_core(
    sd15_parts: Tensors, load: Any, comfy: Any, model: Any, tmp_path: Path
) -> None:
    save_file(sd15_parts, tmp_path / "dense.safetensors")
    found = load(str(tmp_path / "dense.safetensors"), "auto")
    assert not [*model.packed_modules(found[0].model)]
    check(found, load_dense(comfy, tmp_path / "dense.safetensors"), "sd15", model)


def test_a_diffusion_model_alone(twins: Any, load: Any, model: Any, caplog: Any) -> None:
    """As with core's loader, the other outputs are empty; the log says what to load."""
    pair = twins("sd15", "Q8_0")
    patcher, clip, vae = load(str(pair.gguf))
    assert clip is None
    with pytest.raises(RuntimeError, match="VAE is invalid"):
        vae.decode(torch.zeros(1, 4, 8, 8))
    assert "holds no text encoder: load one with" in caplog.text and "holds no VAE" in caplog.text
    assert model.relative_error(model.run(patcher), model.run(pair.load()[1])) < 1e-3


def test_factories_and_progress(
    sd15_parts: Tensors, load: Any, comfy: Any, model: Any, tmp_path: Path
) -> None:
    import comfy.utils

    path = write_sdcpp(tmp_path / "sd15.gguf", sd15_parts)
    seen: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: seen.append((value, total)))
    try:
        patcher, clip, vae = load(str(path), "fp32")
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert seen[-1][0] == seen[-1][1]
    assert [value for value, _ in seen] == sorted(value for value, _ in seen)
    for first in (patcher, clip.patcher, vae.patcher):
        factory, arguments = first.cached_patcher_init
        again = factory(*arguments, disable_dynamic=True)
        assert again.model is not first.model
        old, new = first.model.state_dict(), again.model.state_dict()
        assert old.keys() == new.keys() and old
        name = list(old)[-1]
        assert torch.equal(old[name].to("cpu"), new[name].to("cpu"))


def test_dynamic_vram(
    sd15_parts: Tensors, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ComfyUI's patcher with paging takes all parts, and every weight has arrived."""
    path = write_sdcpp(tmp_path / "sd15.gguf", sd15_parts)
    load_dynamically(monkeypatch)
    patcher, clip, vae = load(str(path), "fp32")
    for part, name in ((patcher, "SnugModelPatcherDynamic"), (clip.patcher, "SnugModelPatcherDynamic")):
        assert type(part).__name__ == name and part.is_dynamic()
    for part in (patcher, clip.patcher, vae.patcher):
        assert not [name for name, value in part.model.named_parameters() if value.is_meta]
    patcher.partially_load(patcher.load_device)


def test_refusals(load: Any, comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence each, before anything is built."""
    import comfy.sd
    from snug.quant_backends.core.errors import FileFormatError

    def fail(*_args: Any, **_options: Any) -> None:
        raise AssertionError("loaded before it was checked")

    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", fail)
    monkeypatch.setattr(comfy.sd, "load_state_dict_guess_config", fail)
    path = tmp_path / "bad.safetensors"

    def save(*names: str) -> Callable[[], None]:
        return lambda: save_file({name: torch.zeros(4, 4) for name in names}, path)

    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: torch.save({"a": torch.zeros(4)}, path), "PyTorch pickle"),
        (save("lora_unet_x.lora_up.weight", "lora_unet_x.lora_down.weight"), "a LoRA"),
        (save("text_model.encoder.layers.0.mlp.fc1.weight"), "a text encoder"),
        (save("decoder.conv_in.weight", "encoder.conv_in.weight"), "a VAE"),
        (save("first_stage_model.x", "text_encoders.y"), "no diffusion model"),
        (save("model.diffusion_model.a.qweight", "model.diffusion_model.a.wscales"), "SVDQuant"),
        (lambda: path.write_bytes(path.read_bytes()[:-8]), "ends at byte"),
        (lambda: path.write_bytes(b""), "empty"),
    ]
    for write, expected in cases:
        write()
        with pytest.raises(FileFormatError, match=rf"bad\.safetensors: .*{expected}") as caught:
            load(str(path))
        assert "\n" not in str(caught.value)


def test_a_model_that_nobody_knows(load: Any, tmp_path: Path) -> None:
    from snug.quant_backends.core.errors import FileFormatError

    tensors, metadata = quantize_tensors({"model.diffusion_model.a.weight": torch.randn(64, 64)}, "nf4")
    for content in (tensors, {"model.diffusion_model.a.weight": torch.zeros(4, 4)}):
        save_file(content, tmp_path / "odd.safetensors", metadata=metadata)
        with pytest.raises(FileFormatError, match=r"odd\.safetensors: .*cannot be used as a checkpoint"):
            load(str(tmp_path / "odd.safetensors"))
