"""ComfyUI's own saving, merging and weight hooks on models with packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def save(patcher: Any, path: Path) -> dict[str, torch.Tensor]:
    """What ComfyUI's ModelSave node writes."""
    import comfy.sd

    comfy.sd.save_checkpoint(str(path), patcher)
    return load_file(path)


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_model_save_writes_the_dense_weights(family: str, request: Any, tmp_path: Path) -> None:
    packed, dense = request.getfixturevalue(family)
    saved, wanted = save(packed, tmp_path / "packed.safetensors"), save(dense, tmp_path / "dense.safetensors")
    assert saved.keys() == wanted.keys()
    for name, value in wanted.items():
        assert saved[name].dtype == value.dtype and torch.equal(saved[name], value), name


def test_model_save_merges_the_lora(sd3: Any, tmp_path: Path, model: Any) -> None:
    lora = model.make_lora(sd3[0].model, 1)
    plain = save(sd3[0], tmp_path / "plain.safetensors")
    packed = save(model.with_lora(sd3[0], lora), tmp_path / "packed.safetensors")
    dense = save(model.with_lora(sd3[1], lora), tmp_path / "dense.safetensors")
    changed = 0
    for name, value in dense.items():
        assert torch.allclose(packed[name], value, rtol=1e-4, atol=1e-5), name
        changed += not torch.equal(packed[name], plain[name])
    assert changed == len(lora) // 2


@pytest.mark.parametrize("budget", [0.0001, 0.5])
def test_saving_a_partly_loaded_model(budget: float, sd3: Any, model: Any) -> None:
    patcher = model.with_lora(sd3[0], model.make_lora(sd3[0].model, 1))
    patcher.patch_model(patcher.load_device, lowvram_model_memory=max(1, int(patcher.model_size() * budget)))
    modules = dict(model.packed_modules(patcher.model.diffusion_model))
    # Newer ComfyUI saves through the patcher, older through the model.
    saved = getattr(patcher, "state_dict_for_saving", patcher.model.state_dict_for_saving)()
    values = {name.removeprefix("model.diffusion_model."): value for name, value in saved.items()}
    for name, module in modules.items():
        assert torch.equal(values[f"{name}.weight"].to("cpu"), module.dense_weight())


def test_saved_file_loads_and_predicts_the_same(sd3: Any, tmp_path: Path, model: Any) -> None:
    import comfy.sd

    save(sd3[0], tmp_path / "saved.safetensors")
    again = comfy.sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    assert torch.allclose(model.run(again, load=True), model.run(sd3[0], load=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first,second", [("packed", "packed"), ("packed", "dense"), ("dense", "packed")])
def test_model_merge(first: str, second: str, twins: Any, model: Any) -> None:
    """ModelMergeSimple with ratio 0.25, against the same merge of the dense models."""

    def merge(one: Any, two: Any) -> torch.Tensor:
        merged = one.clone()
        for key, patch in two.get_key_patches("diffusion_model.").items():
            merged.add_patches({key: patch}, 0.75, 0.25)
        return model.run(merged, load=True)

    pair, other = twins("sd3", "Q4_0").load(), twins("sd3", "Q8_0").load()
    kinds = ("packed", "dense")
    merged = merge(pair[kinds.index(first)], other[kinds.index(second)])
    wanted = merge(pair[1], other[1])
    assert not torch.allclose(wanted, model.run(pair[1], load=True), atol=1e-3)
    assert torch.allclose(merged, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["MinVram", "MaxSpeed"])
def test_weight_hooks(mode: str, sd3: Any, model: Any) -> None:
    """A LoRA as a hook is switched on and off between predictions, twice (the second time from the cache)."""
    import comfy.hooks

    lora = model.make_lora(sd3[0].model, 6)
    changes = []
    for patcher in sd3:
        patcher = model.with_lora(patcher, model.make_lora(sd3[0].model, 7), 0.4)
        patcher.set_hook_mode(comfy.hooks.EnumHookMode[mode])
        hooks = comfy.hooks.create_hook_lora(dict(lora), 0.7, 0.0)
        patcher.register_all_hook_patches(
            hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        )
        plain = model.run(patcher, load=True)
        for _ in range(2):
            patcher.apply_hooks(hooks)
            changes.append(model.run(patcher) - plain)
            patcher.apply_hooks(None)
            assert torch.allclose(model.run(patcher), plain, rtol=1e-5, atol=1e-5)
        patcher.clean_hooks()
    packed, packed_again, dense, _ = changes
    assert dense.abs().max() > 0.05
    assert model.relative_error(packed, dense) < 0.01
    assert torch.equal(packed, packed_again)
