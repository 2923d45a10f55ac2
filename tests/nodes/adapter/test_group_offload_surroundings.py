"""Group offloading beside the rest of ComfyUI: text encoders, disk, weight hooks, saving, dynamic VRAM."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_paging import FakeVBAR, fake_paging
from safetensors.torch import save_file
from simulated_transfers import Transfers, simulate_transfers
from small_text_encoders import PROMPT, SmallCLIP, load_dense
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.memory.slab import host_bytes_in_use
from snug.quant_backends.memory.spill import MAPS, FileBacked


@pytest.fixture(autouse=True)
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    """One for each slab that is made."""
    yield simulate_transfers(monkeypatch)
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    assert host_bytes_in_use() == 0


def offloaded(patcher: Any, **settings: Any) -> Any:
    from snug.nodes.adapter.group_offload import OffloadSettings, offload_model

    return offload_model(patcher, OffloadSettings(**settings))[0]


def streamed_tensors(patcher: Any) -> list[torch.Tensor]:
    units, offloading = patcher.offloading.units(patcher.model), patcher.offloading
    plan = offloading.plan(patcher.model, units)
    return [tensor for index in sorted(plan.streamed) for tensor in units[index].tensors]


def test_text_encoder(comfy: Any, monkeypatch: Any, tmp_path: Path, transfers: Transfers) -> None:
    from snug.nodes.group_offload import SnugGroupOffloadCLIP

    save_file(SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json"), tmp_path / "clip.safetensors")
    clip = load_dense(comfy, tmp_path / "clip.safetensors", "stable_diffusion")

    def encode(clip: Any) -> torch.Tensor:
        return clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)[0]

    wanted = encode(clip)
    streamed, report = SnugGroupOffloadCLIP.execute(
        clip,
        limit_gb=0.0,
        level="blocks",
        blocks_per_group=1,
        prefetch="1",
        pin_memory=True,
        offload_to="CPU memory",
    ).args
    for _ in range(2):
        assert torch.equal(encode(streamed), wanted)
    assert sum(event.kind == "copy" for event in transfers[-1].clock.events) > 2
    assert "streamed" in report
    assert torch.equal(encode(clip), wanted)


@pytest.mark.parametrize("is_dense", [False, True])
def test_weights_in_memory_are_not_held_twice(
    sd3: Any, transfers: Transfers, model: Any, is_dense: bool
) -> None:
    """Dense weights move into the slab, and stay there when it is unpinned; mapped ones are left in their file."""
    patcher = sd3[is_dense]
    wanted = model.run(patcher, load=True)
    streamed = offloaded(patcher)
    addresses = [[tensor.data_ptr() for tensor in streamed_tensors(streamed)]]
    for slabs in (1, 2):
        assert torch.equal(model.run(streamed, load=True), wanted)
        assert len(transfers) == slabs
        host = transfers[-1]._host
        assert host is not None
        slab = host.bytes
        inside = [
            0 <= tensor.data_ptr() - slab.data_ptr() < slab.numel() for tensor in streamed_tensors(streamed)
        ]
        assert set(inside) == {is_dense}
        comfy_unload()
        addresses.append([tensor.data_ptr() for tensor in streamed_tensors(streamed)])
    assert (addresses[1] == addresses[0]) == (not is_dense)
    assert addresses[2] == addresses[1], "moved a second time"
    assert torch.equal(model.run(patcher, load=True), wanted)


def test_weights_are_ordinary_tensors(sd3: Any, model: Any) -> None:
    """ComfyUI runs nodes in inference mode; nodes that train leave it."""
    streamed = offloaded(sd3[1])
    with torch.inference_mode():
        model.run(streamed, load=True)
    assert not any(parameter.is_inference() for parameter in streamed.model.parameters())
    slots = streamed.offloading.streaming(streamed.model)._in_slots.values()
    assert slots and not any(parameter.is_inference() for found in slots for parameter in found)


def comfy_unload() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A device that asks for weights on the disk, and ComfyUI's temporary folder."""
    import folder_paths
    from snug.nodes.adapter import offloading

    class Device:
        type = "simulated"

    stream = offloading.Offloading.stream
    monkeypatch.setattr(
        offloading.Offloading,
        "stream",
        lambda self, model, units, plan, _: stream(self, model, units, plan, Device()),
    )
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    return tmp_path / "temp"


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not say what is mapped from files")
@pytest.mark.parametrize("is_dense", [False, True])
def test_weights_on_disk(sd3: Any, disk: Path, model: Any, is_dense: bool) -> None:
    """Dense weights go to a temporary file, once; those that Snug has mapped stay in theirs."""
    patcher = sd3[is_dense]
    wanted = model.run(patcher, load=True)
    streamed = offloaded(patcher, to_disk=True)
    before = [tensor.data_ptr() for tensor in streamed_tensors(streamed)]
    for _ in range(2):
        assert torch.equal(model.run(streamed, load=True), wanted)
        tensors = streamed_tensors(streamed)
        assert all(tensor in FileBacked() for tensor in tensors)
        comfy_unload()
    assert ([tensor.data_ptr() for tensor in tensors] == before) == (not is_dense)
    assert list(disk.iterdir()) == [], "the file is deleted as soon as it is mapped"


def test_a_full_disk_is_told_and_nothing_is_left(
    sd3: Any, disk: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    import shutil

    wanted = model.run(sd3[1], load=True)
    streamed = offloaded(sd3[1], to_disk=True)
    usage = shutil.disk_usage(disk.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SnugError, match="needs .* MB in .* left"):
        model.run(streamed, load=True)
    assert list(disk.iterdir()) == []
    monkeypatch.undo()
    assert torch.equal(model.run(sd3[1], load=True), wanted)


def test_weight_hooks(sd3: Any, model: Any) -> None:
    """A LoRA that is switched on and off within a step changes weights behind the slab's back."""
    import comfy.hooks

    lora = model.make_lora(sd3[0].model, 6)
    for patcher in sd3:
        changes = []
        for patched in (patcher.clone(), offloaded(patcher)):
            hooks = comfy.hooks.create_hook_lora(dict(lora), 0.7, 0.0)
            patched.register_all_hook_patches(
                hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
            )
            plain = model.run(patched, load=True)
            patched.apply_hooks(hooks)
            changes.append(model.run(patched) - plain)
            patched.apply_hooks(None)
            assert torch.allclose(model.run(patched), plain, rtol=1e-5, atol=1e-5)
            patched.clean_hooks()
        assert changes[0].abs().max() > 0.05
        assert model.relative_error(changes[1], changes[0]) < 1e-4


def test_saving_a_streamed_model_with_a_lora(sd3: Any, model: Any, tmp_path: Path) -> None:
    import comfy.sd
    from safetensors.torch import load_file

    for number, patcher in enumerate(sd3):
        patched = model.with_lora(patcher, model.make_lora(sd3[0].model, 1))
        streamed = offloaded(patched)
        model.run(streamed, load=True)
        saved = []
        for which in (streamed, patched):
            path = tmp_path / f"{number}-{len(saved)}.safetensors"
            comfy.sd.save_checkpoint(str(path), which)
            saved.append(load_file(path))
        assert saved[0].keys() == saved[1].keys()
        for name, value in saved[1].items():
            assert torch.allclose(saved[0][name], value, atol=1e-6), name


def test_lora_of_plain_layers_waits_on_the_device(
    sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying it for each layer would wait behind the group that is on its way. The meta device stands for a GPU."""
    import comfy.model_management

    lora = model.make_lora(sd3[0].model, 1)
    streamed = model.with_lora(offloaded(sd3[1]), lora)
    model.run(streamed, load=True)
    units = streamed.offloading.units(streamed.model)
    layers = {place.module for unit in units for place in unit.places}
    names = {name for name, layer in streamed.model.named_modules() if layer in layers}
    patched = [name for name in names if f"{name}.weight" in streamed.patches]
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 8 << 30)
    streamed.load_device = torch.device("meta")
    nbytes = streamed._load_patches(layers)
    assert nbytes == sum(
        lora[f"{name}.lora_{part}.weight"].nbytes for name in patched for part in ("up", "down")
    )
    for name in patched:
        (function,) = streamed.model.get_submodule(name).weight_function
        assert {weight.device.type for weight in function.patches[0][1].weights[:2]} == {"meta"}
    monkeypatch.undo()


def test_cancelling_while_weights_are_copied(sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as management

    wanted = model.run(sd3[0], load=True)
    streamed = offloaded(sd3[0])
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        management.load_models_gpu([streamed])
    assert host_bytes_in_use() == 0
    assert torch.equal(model.run(streamed, load=True), wanted)


def test_a_device_without_streams_offloads_as_comfyui_does(
    sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snug.nodes.adapter import offloading

    monkeypatch.setattr(offloading, "transfer_to", lambda *_: None)
    wanted = model.run(sd3[0], load=True)
    streamed = offloaded(sd3[0])
    assert torch.equal(model.run(streamed, load=True), wanted)
    assert streamed.loaded_size() < sd3[0].model_size() / 2


def test_dynamic_vram_is_told_how_much_may_stay(sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_paging(monkeypatch)
    import comfy.model_patcher
    from snug.nodes.adapter.patcher import adopt

    limits: list[int] = []
    monkeypatch.setattr(FakeVBAR, "set_watermark_limit", lambda _, size: limits.append(size), raising=False)
    patcher = adopt(
        comfy.model_patcher.ModelPatcherDynamic(sd3[0].model, torch.device("meta"), torch.device("cpu"))
    )
    streamed = offloaded(patcher, limit=1 << 30)
    assert "dynamic VRAM" in streamed.offload_report()
    for _ in range(2):  # core forgets the limit after every node
        streamed.partially_load(streamed.load_device)
    assert limits == [(1 << 30) - streamed.model.model_loaded_weight_memory] * 2
    patcher.partially_load(patcher.load_device)
    assert len(limits) == 2, "a clone without the node is limited"
    monkeypatch.undo()
