"""ControlNets and quantized models: as their dequantized twins do through ComfyUI's own loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import prefixed, taesd
from controlnet_files import Tensors, classic_controlnet, flux_controlnet, sd3_controlnet
from fake_paging import load_dynamically
from narrow_models import accept_narrow_models
from native_quantizer import native_quantizer
from quantized_files import dense_tensors, quantize_tensors
from safetensors.torch import save_file

TOLERANCE = 1e-3  # of the change that the ControlNet makes


MAKERS = {"sd15": classic_controlnet, "sd3": sd3_controlnet, "flux": flux_controlnet}
# A layer of each that is quantized in every file; in the last two it is put together from diffusers' parts.
LAYERS = {
    "sd15": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "sd3": "joint_blocks.0.x_block.attn.qkv",
    "flux": "single_blocks.0.linear1",
}
CONTEXT_WIDTHS = {"sd15": 768, "sd3": 4096, "flux": 512}
POOLED_WIDTHS = {"sd3": 2048, "flux": 768}


def write(kind: str, tensors: Tensors, folder: Path) -> tuple[Path, Path]:
    """(quantized file, dense twin)."""
    from snug.quant_backends.core.packed import PackedTensor
    from snug.quant_backends.kernels.dequantize import dequantize_packed
    from snug.quant_backends.readers import GGUFFile
    from snug.quant_backends.readers.diffusion_gguf import load_repaired
    from snug.quant_backends.writers.gguf_file import write_gguf

    twin = folder / "dense.safetensors"
    if kind.startswith("Q"):
        path = folder / "packed.gguf"
        architecture = "sd1" if "input_hint_block.0.weight" in tensors else "sd3"
        write_gguf(path, tensors, kind, architecture=architecture, quantizer=native_quantizer)
        file = GGUFFile(path)
        found = load_repaired(file, file.tensors)
        dense = {
            name: dequantize_packed(value) if isinstance(value, PackedTensor) else value.float().clone()
            for name, value in found.items()
        }
    else:
        path = folder / "packed.safetensors"
        quantized, metadata = quantize_tensors({name: value.half() for name, value in tensors.items()}, kind)
        save_file({name: value.contiguous() for name, value in quantized.items()}, path, metadata=metadata)
        dense = dense_tensors(path)
    save_file(dense, twin)
    return path, twin


@pytest.fixture
def sample(comfy: Any, tmp_path: Path) -> Callable[..., torch.Tensor]:
    """sample(patcher, control) on fixed inputs; control may be None."""
    import comfy.sample
    import comfy.sd

    def run(patcher: Any, control: Any) -> torch.Tensor:
        family = {"SD3": "sd3", "Flux": "flux"}.get(type(patcher.model).__name__, "sd15")
        generator = torch.Generator().manual_seed(4)
        context = torch.randn(1, 77, CONTEXT_WIDTHS[family], generator=generator)
        hint = torch.rand(1, 3, 64, 64, generator=generator)
        noise = torch.randn(1, patcher.model.latent_format.latent_channels, 8, 8, generator=generator)
        options: dict[str, Any] = {}
        if family in POOLED_WIDTHS:
            options["pooled_output"] = torch.randn(1, POOLED_WIDTHS[family], generator=generator)
        if control is not None:
            with_vae = family in POOLED_WIDTHS  # the transformers' ControlNets want a latent
            vae = comfy.sd.VAE(sd=taesd(tmp_path / "vae", "taesd3")) if with_vae else None
            options["control"] = control.copy().set_cond_hint(hint, 0.9, (0.0, 1.0), vae=vae)
            options["control_apply_to_uncond"] = True
        conditioning = [[context, options]]
        return comfy.sample.sample(
            patcher,
            noise,
            2,
            2.0,
            "euler",
            "normal",
            conditioning,
            conditioning,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )

    return run


@pytest.mark.parametrize(
    "family,kind",
    [
        *(("sd15", kind) for kind in ("Q8_0", "nf4", "fp8", "torchao-int8")),
        *(("sd3", kind) for kind in ("Q8_0", "nf4", "fp8", "quanto-int8")),
        *(("flux", kind) for kind in ("Q8_0", "nf4")),
    ],
)
def test_equal_to_the_dense_twin(
    family: str,
    kind: str,
    sample: Any,
    twins: Any,
    comfy: Any,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import comfy.controlnet
    from snug.nodes.adapter.controlnets import load_controlnet

    accept_narrow_models(monkeypatch)
    path, twin = write(kind, MAKERS[family](), tmp_path)
    patcher = comfy.sd.load_diffusion_model(str(twins(family, "Q8_0").dense))
    packed, dense = load_controlnet(str(path)), comfy.controlnet.load_controlnet(str(twin))
    modules = dict(model.packed_modules(packed.control_model))
    assert LAYERS[family] in modules
    assert packed.control_model_wrapped.model_size() < 0.7 * dense.control_model_wrapped.model_size()
    plain = sample(patcher, None)
    wanted = sample(patcher, dense) - plain
    assert wanted.norm() > 0.02 * plain.norm(), "the ControlNet does nothing"
    assert model.relative_error(sample(patcher, packed) - plain, wanted) < TOLERANCE


def test_a_plain_one_steers_a_packed_model(
    sample: Any, sd15: Any, comfy: Any, model: Any, tmp_path: Path
) -> None:
    """Through ComfyUI's own loader, as most workflows have it."""
    import comfy.controlnet

    path = tmp_path / "control.safetensors"
    save_file(classic_controlnet(), path)
    control = comfy.controlnet.load_controlnet(str(path))
    packed, dense = (sample(patcher, control) - sample(patcher, None) for patcher in sd15)
    assert dense.norm() > 0.02 * sample(sd15[1], None).norm(), "the ControlNet does nothing"
    assert model.relative_error(packed, dense) < TOLERANCE


@pytest.mark.parametrize("family", MAKERS)
def test_dynamic_vram(
    family: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, model: Any, tmp_path: Path
) -> None:
    """ComfyUI's patcher with paging takes the network, and every weight of it has arrived."""
    from snug.nodes.adapter.controlnets import load_controlnet

    accept_narrow_models(monkeypatch)
    path, _ = write("nf4", MAKERS[family](), tmp_path)
    load_dynamically(monkeypatch)
    patcher = load_controlnet(str(path)).control_model_wrapped
    assert type(patcher).__name__ == "SnugModelPatcherDynamic" and patcher.is_dynamic()
    assert len([*model.packed_modules(patcher.model)]) > 5
    assert not [name for name, value in patcher.model.named_parameters() if value.is_meta]
    patcher.partially_load(patcher.load_device)


def test_packed_model_and_packed_controlnet(
    sd15: Any, sample: Any, model: Any, comfy: Any, tmp_path: Path
) -> None:
    """Both at once, the ControlNet offloaded while the model is loaded."""
    import comfy.controlnet
    from snug.nodes.adapter.controlnets import load_controlnet

    path, twin = write("Q8_0", classic_controlnet(), tmp_path)
    found = sample(sd15[0], load_controlnet(str(path)))
    wanted = sample(sd15[1], comfy.controlnet.load_controlnet(str(twin)))
    assert model.relative_error(found, wanted) < 0.001


def test_control_lora_is_decoded(sd15: Any, sample: Any, model: Any, comfy: Any, tmp_path: Path) -> None:
    """ComfyUI builds it on the model's own weights and calculates with its factors."""
    import comfy.controlnet
    from snug.nodes.adapter.controlnets import load_controlnet

    tensors = {"lora_controlnet": torch.zeros(1)}
    generator = torch.Generator().manual_seed(2)
    for name, value in classic_controlnet().items():
        if name.startswith(("input_hint_block", "zero_convs", "middle_block")):  # the tiny UNet has no middle
            tensors[name] = value
        elif name.endswith("attn1.to_q.weight"):
            layer = name.removesuffix(".weight")
            tensors[f"{layer}.up"] = torch.randn(value.shape[0], 64, generator=generator) * 0.05
            tensors[f"{layer}.down"] = torch.randn(64, value.shape[1], generator=generator) * 0.05
    path, twin = write("Q8_0", tensors, tmp_path)
    found = sample(sd15[0], load_controlnet(str(path)))
    wanted = sample(sd15[1], comfy.controlnet.load_controlnet(str(twin)))
    assert (wanted - sample(sd15[1], None)).norm() > 0.02 * wanted.norm()
    assert model.relative_error(found, wanted) < 0.001


def test_plain_files_go_to_core(comfy: Any, model: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.controlnets import load_controlnet

    save_file(prefixed("control_model.", classic_controlnet()), tmp_path / "plain_shuffle.safetensors")
    control = load_controlnet(str(tmp_path / "plain_shuffle.safetensors"))
    assert not [*model.packed_modules(control.control_model)] and control.global_average_pooling


def test_averaged_by_name(comfy: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.controlnets import load_controlnet

    path, _ = write("Q8_0", prefixed("control_model.", classic_controlnet()), tmp_path)
    assert not load_controlnet(str(path)).global_average_pooling
    assert load_controlnet(str(path.rename(tmp_path / "control_shuffle.gguf"))).global_average_pooling


def test_an_incomplete_file(tmp_path: Path, comfy: Any) -> None:
    from snug.nodes.adapter.controlnets import load_controlnet
    from snug.quant_backends.core.errors import FileFormatError

    tensors = sd3_controlnet()
    del tensors["transformer_blocks.1.attn.to_k.weight"]
    path, _ = write("Q8_0", tensors, tmp_path)
    with pytest.raises(FileFormatError, match=r"packed\.gguf: the parts of .*incomplete"):
        load_controlnet(str(path))


def test_refusals(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twins: Any) -> None:
    """One sentence each, before anything is built."""
    import comfy.controlnet
    from snug.nodes.adapter.controlnets import load_controlnet
    from snug.quant_backends.core.errors import FileFormatError

    def fail(*_args: Any, **_options: Any) -> None:
        raise AssertionError("loaded before it was checked")

    monkeypatch.setattr(comfy.controlnet, "load_controlnet", fail)
    monkeypatch.setattr(comfy.controlnet, "load_controlnet_state_dict", fail)
    path = tmp_path / "bad.safetensors"

    def save(*names: str) -> Callable[[], None]:
        return lambda: save_file({name: torch.zeros(4, 4) for name in names}, path)

    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: torch.save({"a": torch.zeros(4)}, path), "PyTorch pickle"),
        (save("lora_unet_x.lora_up.weight", "lora_unet_x.lora_down.weight"), "a LoRA.*Load LoRA"),
        (save("model.diffusion_model.a.weight"), "a whole checkpoint.*Load Checkpoint"),
        (save("text_model.encoder.layers.0.mlp.fc1.weight"), "a text encoder"),
        (save("double_blocks.0.img_attn.proj.weight"), "a diffusion model.*Load Diffusion Model"),
        (save("decoder.conv_in.weight", "encoder.conv_in.weight"), "a VAE"),
        (save("something"), "no ControlNet that Snug knows"),
        (save("controlnet_blocks.0.qweight", "controlnet_blocks.0.wscales"), "SVDQuant"),
        (lambda: path.write_bytes(path.read_bytes()[:-8]), "ends at byte"),
    ]
    for make, expected in cases:
        make()
        with pytest.raises(FileFormatError, match=rf"bad\.safetensors: .*{expected}") as caught:
            load_controlnet(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(FileFormatError, match=r"\.gguf: the file is a diffusion model"):
        load_controlnet(str(twins("sd3", "Q4_0").gguf))


def test_a_network_that_nobody_knows(comfy: Any, tmp_path: Path) -> None:
    from snug.nodes.adapter.controlnets import load_controlnet
    from snug.quant_backends.core.errors import FileFormatError

    for layer in ("controlnet_blocks.0", "zero_convs.0.0", "body.0"):
        tensors, metadata = quantize_tensors({f"{layer}.weight": torch.randn(64, 64)}, "nf4")
        save_file(tensors, tmp_path / "odd.safetensors", metadata=metadata)
        with pytest.raises(FileFormatError, match=r"odd\.safetensors: .*cannot be used as a ControlNet"):
            load_controlnet(str(tmp_path / "odd.safetensors"))
