"""Dynamic VRAM: ComfyUI's real ModelPatcherDynamic, with the meta device in place of a GPU.

Paging itself needs the NVIDIA driver and is stubbed; what is tested is what the patcher attaches, counts, lets go
of and saves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import make_adapter
from fake_paging import fake_paging, load_dynamically
from safetensors.torch import load_file


@pytest.fixture
def dynamic(sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A packed model with a LoRA, loaded by core's ModelPatcherDynamic."""
    fake_paging(monkeypatch)
    import comfy.model_patcher
    from snug.nodes.adapter.patcher import adopt

    patcher = adopt(
        comfy.model_patcher.ModelPatcherDynamic(sd3[0].model, torch.device("meta"), torch.device("cpu"))
    )
    patcher.cached_patcher_init = sd3[0].cached_patcher_init
    patched = model.with_lora(patcher, model.make_lora(patcher.model, 1))
    patched.partially_load(patched.load_device)
    return patched


def test_core_never_merges_the_lora(dynamic: Any, model: Any) -> None:
    """Core would quantize the merged weight again; the layers hold the patches instead, on the device."""
    for _, module in model.packed_modules(dynamic.model):
        assert getattr(module, "weight_lowvram_function", None) is None
        assert module.weight_patches.device == dynamic.load_device


def test_too_large_a_lora_stays_on_the_cpu(dynamic: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 0)
    again = model.with_lora(dynamic, model.make_lora(dynamic.model, 2))
    again.partially_load(again.load_device)
    assert {module.weight_patches.device for _, module in model.packed_modules(again.model)} == {None}


@pytest.mark.parametrize("cache", [True, False])
def test_lora_modes_on_the_device(
    cache: bool, dynamic: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors of a branch, and what is kept merged, are counted on the device until ComfyUI wants the memory."""
    import comfy.model_management
    import comfy.sd
    from snug.nodes.adapter.lora_mode import set_lora_mode

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 8 << 30)
    before = dynamic.model.model_loaded_weight_memory
    clone, _ = set_lora_mode(dynamic, "side branch", cache)
    shapes = {name: tuple(layer.weight.shape) for name, layer in model.packed_modules(dynamic.model)}
    some = {name: shape for name, shape in shapes.items() if ".mlp." in name}
    clone, _ = comfy.sd.load_lora_for_models(clone, None, make_adapter("LoHa", some), 1.0, 0)
    clone.partially_load(clone.load_device)
    branches = kept = 0
    for name, layer in model.packed_modules(clone.model):
        patches = layer.weight_patches
        if name in some:
            assert patches.branch is None
            assert (patches.kept is not None) == cache
            kept += 0 if patches.kept is None else patches.kept.nbytes
        else:
            assert patches.kept is None
            assert patches.branch.up.device == patches.branch.down.device == clone.load_device
            assert patches.branch.shape.rank == 16, "padded to whole tiles"
            branches += patches.branch.nbytes
    counted = clone.model.model_loaded_weight_memory
    assert counted - before > kept and branches
    for _ in range(2):
        clone.partially_load(clone.load_device)
        assert clone.model.model_loaded_weight_memory == counted
    if cache:
        assert kept == sum(4 * rows * columns for rows, columns in some.values())
        assert clone.partially_unload(torch.device("cpu"), 1) == kept
        assert clone.model.model_loaded_weight_memory == counted - kept
    clone.detach()
    assert clone.model.model_loaded_weight_memory == 0


@pytest.mark.parametrize("mode", ["merge while dequantizing", "side branch"])
def test_what_core_takes_for_freed_is_freed(mode: str, dynamic: Any, model: Any) -> None:
    from snug.nodes.adapter.lora_mode import set_lora_mode

    clone, _ = set_lora_mode(dynamic, mode, True)
    clone.partially_load(clone.load_device)
    layers = [layer for _, layer in model.packed_modules(clone.model)]
    counted, held = (
        clone.model.model_loaded_weight_memory,
        sum(layer.weight_patches.nbytes for layer in layers),
    )
    assert held and clone.partially_unload(torch.device("cpu"), 1e30) == counted
    assert not sum(layer.weight_patches.nbytes for layer in layers)
    assert clone.model.model_loaded_weight_memory == 0
    clone.partially_load(clone.load_device)
    assert clone.model.model_loaded_weight_memory == counted


def test_unload_lets_go_of_the_lora(dynamic: Any, model: Any) -> None:
    dynamic.detach()
    assert not [name for name, m in model.packed_modules(dynamic.model) if m.weight_patches is not None]
    assert dynamic.model.model_loaded_weight_memory == 0


def test_clone_without_dynamic_vram_keeps_snugs_patcher(dynamic: Any, model: Any) -> None:
    clone = dynamic.clone(disable_dynamic=True)
    assert not clone.is_dynamic()
    assert type(clone).__name__ == "SnugModelPatcher"
    assert len(list(model.packed_modules(clone.model))) == len(list(model.packed_modules(dynamic.model)))


def test_saving_is_dense_and_merged(dynamic: Any, model: Any, tmp_path: Path) -> None:
    import comfy.utils

    # What the layers hold is "on the device"; values are needed here.
    for _, module in model.packed_modules(dynamic.model):
        module.weight_patches = None
    state_dict = {
        name: value
        for name, value in dynamic.state_dict_for_saving().items()
        if type(value).__name__ == "PackedStateTensor"
    }
    assert len(state_dict) == len(list(model.packed_modules(dynamic.model)))
    comfy.utils.save_torch_file(state_dict, str(tmp_path / "saved.safetensors"))
    saved = load_file(tmp_path / "saved.safetensors")
    for name, module in model.packed_modules(dynamic.model):
        assert torch.equal(saved[f"model.{name}.weight"], module.dense_weight())


def test_assigned_state_dict(twins: Any, model: Any) -> None:
    """With dynamic VRAM, core loads with assign=True: tensors stay views of the file, biases take the model's dtype."""
    packed, dense = twins("sd3", "Q4_0").load()
    wanted = model.run(dense, load=True)
    network = packed.model.diffusion_model
    values = network.state_dict()
    network.load_state_dict(values, assign=True)
    assert torch.allclose(model.run(packed, load=True), wanted, rtol=1e-5, atol=1e-5)


def test_float8_that_core_makes_when_it_pages(
    twins: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamic VRAM `weight_dtype` only says what weights become on the device; the file's stay in memory."""
    import comfy.sd
    from snug.nodes.adapter.lora_mode import set_lora_mode

    tensors = load_file(twins("sd3", "Q4_0").dense)
    load_dynamically(monkeypatch)
    float8 = comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"dtype": torch.float8_e4m3fn})
    layers = {name: m for name, m in float8.model.named_modules() if hasattr(m, "out_features")}
    assert {layer.weight.dtype for layer in layers.values()} == {torch.float32}
    new, _ = set_lora_mode(float8, "side branch", True)
    packed = dict(model.packed_modules(new.model))
    assert layers.keys() <= packed.keys()
    for name, layer in layers.items():
        wanted = layer.weight.to(torch.float8_e4m3fn).float()
        assert torch.equal(packed[name].dense_weight(dtype=torch.float32), wanted)
        assert layer.weight.dtype == torch.float32
