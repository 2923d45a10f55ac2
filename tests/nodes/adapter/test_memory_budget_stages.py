"""What a memory budget does beside the model: ControlNets, decoding and encoding in pieces, other devices."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import taesd
from controlnet_files import classic_controlnet
from memory_budgets import GIGABYTE, LEAST_FREE, MEGABYTE, RESERVE, apply, roomy_gpu
from safetensors.torch import save_file
from simulated_gpu import DEVICE, SimulatedGPU
from snug.quant_backends.core.errors import SnugError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGPU:
    return roomy_gpu(monkeypatch)


@pytest.fixture
def vae(comfy: Any, tmp_path: Path, gpu: SimulatedGPU) -> Any:
    vae = comfy.sd.VAE(sd=taesd(tmp_path, "taesd"))
    vae.device = DEVICE
    gpu.holds(vae.patcher)
    return vae


def sample(patcher: Any, control: Any = None, size: int = 8) -> torch.Tensor:
    import comfy.sample

    generator = torch.Generator().manual_seed(4)
    options: dict[str, Any] = {}
    if control is not None:
        hint = torch.rand(1, 3, 64, 64, generator=generator)
        options = {"control": control.copy().set_cond_hint(hint, 0.9), "control_apply_to_uncond": True}
    conditioning = [[torch.randn(1, 77, 768, generator=generator), options]]
    noise = torch.randn(1, 4, size, size, generator=generator)
    settings = (2, 2.0, "euler", "normal", conditioning, conditioning, torch.zeros_like(noise))
    return comfy.sample.sample(patcher, noise, *settings, disable_pbar=True, seed=0)


def test_controlnets_take_of_the_budget(sd15: Any, gpu: SimulatedGPU, tmp_path: Path) -> None:
    from comfy.patcher_extension import WrappersMP
    from snug.nodes.adapter.controlnets import load_controlnet

    save_file(classic_controlnet(), tmp_path / "control.safetensors")
    control = load_controlnet(str(tmp_path / "control.safetensors"))
    control.load_device = DEVICE
    _, dense = sd15
    gpu.holds(dense, control.control_model_wrapped)
    wanted = sample(dense, control)
    weights = int(0.7 * dense.model_size()) + control.control_model_wrapped.model_size()
    budget = weights + LEAST_FREE + RESERVE
    models, report = apply(budget, dense, control_net=control)
    assert models.control_net is control
    assert "ControlNet (" in report and "streamed" in report
    assert "streamed" not in apply(budget, dense)[1]
    used = []

    def watch(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        used.append(gpu.used)
        return executor(*args, **kwargs)

    models.model.add_wrapper(WrappersMP.APPLY_MODEL, watch)
    assert torch.equal(sample(models.model, control), wanted)
    assert used and control.control_model_wrapped.model_size() < max(used) <= weights
    with pytest.raises(SnugError, match="MB for ControlNet"):
        apply(control.control_model_wrapped.model_size() + LEAST_FREE, dense, control_net=control)
    control.inference_memory_requirements = lambda _dtype: GIGABYTE
    with pytest.raises(SnugError, match="1.0 GB for computing"):
        apply(budget, dense, control_net=control)


def test_controlnets_do_not_count_twice(sd3: Any, sd15: Any, gpu: SimulatedGPU, tmp_path: Path) -> None:
    """While it is loaded, a ControlNet's part of the budget is its own, and the rest is that of other models."""
    import comfy.model_management
    from snug.nodes.adapter.controlnets import load_controlnet

    save_file(classic_controlnet(), tmp_path / "control.safetensors")
    control = load_controlnet(str(tmp_path / "control.safetensors"))
    (_, dense), (other, _) = sd15, sd3
    network = control.control_model_wrapped
    gpu.holds(dense, network, other)
    weights = dense.model_size() + network.model_size() + other.model_size()
    model = apply(weights + LEAST_FREE + RESERVE, dense, control_net=control)[0].model
    comfy.model_management.load_models_gpu([other])
    comfy.model_management.load_models_gpu([network])
    model.partially_load(DEVICE, 1e32)  # as ComfyUI does with the second of two models that are used together
    assert gpu.used == weights
    model.detach()
    comfy.model_management.load_models_gpu([other])
    comfy.model_management.load_models_gpu([model, network])
    assert gpu.used == weights


def test_sampling_at_a_larger_size_says_so(
    sd15: Any, gpu: SimulatedGPU, caplog: pytest.LogCaptureFixture
) -> None:
    _, dense = sd15
    gpu.holds(dense)
    model = apply(4 * GIGABYTE, apply(4 * GIGABYTE, dense)[0].model)[0].model
    for size, warnings in ((8, 0), (16, 1)):
        with caplog.at_level(logging.WARNING, "snug"):
            sample(model, size=size)
        assert caplog.text.count("connect the latent") == warnings
    sample(dense, size=16)
    assert caplog.text.count("connect the latent") == 1


def shapes_of(network: torch.nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that a method of the network is called with from here on."""
    found: list[torch.Size] = []
    original = getattr(network, name)

    def call(samples: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(samples.shape)
        return original(samples, *args, **kwargs)

    monkeypatch.setattr(network, name, call)
    return found


@pytest.mark.parametrize("work", ["decode", "encode"])
def test_vae_in_pieces(
    work: str, sd15: Any, vae: Any, gpu: SimulatedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = sd15
    gpu.holds(packed)
    side = 16 if work == "decode" else 128
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(3, *((4, side, side) if work == "decode" else (side, side, 3)), generator=generator)
    shapes = shapes_of(vae.first_stage_model, work, monkeypatch)
    whole = getattr(vae, f"memory_used_{work}")((1, 4, side, side), vae.vae_dtype)
    within = apply(4 * GIGABYTE, packed, vae=vae)[0].vae
    assert 3 * GIGABYTE < within.snug_room < 4 * GIGABYTE
    scale = 8 if work == "decode" else 1
    tile = {"tile_x": 64 // scale, "tile_y": 64 // scale, "overlap": 16 // scale}
    with torch.inference_mode():
        whole_image = getattr(vae, work)(samples)
        in_tiles = getattr(vae, f"{work}_tiled")(samples, **tile)
        for share, batch, largest in ((3.1, 3, side), (1.1, 1, side), (0.3, 1, side // 2)):
            within.snug_room = int(share * whole)
            shapes.clear()
            found = getattr(within, work)(samples)
            wanted = whole_image if share > 1 else in_tiles
            assert (found - wanted).norm() < 1e-5 * wanted.norm()
            assert max(shape[0] for shape in shapes) == batch
            assert max(shape[2] * shape[3] for shape in shapes) == largest**2
        shapes.clear()
        getattr(vae, work)(samples)
    assert shapes[0][0] == 3, "the given VAE is as it was"


def test_decoding_is_planned(sd15: Any, vae: Any, gpu: SimulatedGPU) -> None:
    packed, _ = sd15
    gpu.holds(packed)
    room = int(0.6 * vae.memory_used_decode((1, 4, 32, 32), vae.vae_dtype))
    budget = room + vae.patcher.model_size() + RESERVE
    models, report = apply(budget, packed, size=256, vae=vae)
    assert "256 × 256, batch of 1, in tiles of 192 pixels" in report
    assert models.vae.snug_room == pytest.approx(room, abs=2)
    models, report = apply(2 * budget, packed, size=256, vae=vae)
    assert "tiles" not in report


def test_pictures_and_sound_together(sd15: Any, gpu: SimulatedGPU) -> None:
    from comfy.nested_tensor import NestedTensor

    packed, _ = sd15
    gpu.holds(packed)
    samples = NestedTensor([torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 20)])
    report = apply(8 * GIGABYTE, packed, {"samples": samples})[1]
    assert "latent of 1 × 4 × 8 × 8 and 1 × 4 × 20" in report
    needed = int(packed.model.memory_required([2, 1, 4 * 64 + 4 * 20]))
    assert needed > LEAST_FREE and f"{needed / MEGABYTE:.1f} MB  latent of" in report


def test_models_on_other_devices_are_left_alone(sd15: Any, vae: Any, gpu: SimulatedGPU) -> None:
    packed, _ = sd15
    gpu.holds(packed)
    vae.patcher.load_device = vae.device = torch.device("cpu")
    models, report = apply(4 * GIGABYTE, packed, vae=vae)
    assert models.vae is vae
    assert "VAE: on another device (cpu)" in report and "Decoding" not in report


def test_dynamic_vram(sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI pages such a model itself; the budget is what it is told to keep."""
    from fake_paging import fake_paging

    fake_paging(monkeypatch)
    import comfy.model_management
    import comfy.model_patcher
    from snug.nodes.adapter.patcher import adopt

    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: 16 * GIGABYTE)
    device = torch.device("meta")
    patcher = adopt(comfy.model_patcher.ModelPatcherDynamic(sd3[0].model, device, torch.device("cpu")))
    patcher.cached_patcher_init = sd3[0].cached_patcher_init
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: LEAST_FREE + RESERVE)
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: RESERVE)
    models, report = apply(0.6 * patcher.model_size() + LEAST_FREE + RESERVE, patcher)
    assert models.model.is_dynamic() and "dynamic VRAM" in report
    models.model.partially_load(device)
    static = models.model.clone(disable_dynamic=True)
    assert not static.is_dynamic() and type(static).__name__.count("Budgeted") == 1
    assert static.attachments == models.model.attachments
