"""LoRA on packed weights: the output changes as much as it does on the dense twin, however the model is loaded.

Every comparison is of the change against the model without LoRA, so a LoRA that is lost fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_states import LOADS, load_whole
from quantized_files import KINDS

TOLERANCE = 0.01  # of the change that the LoRA makes
# GGUF, on linear layers and on convolutions, and what every library writes.
EVERY_FORMAT = [("sd3", "Q4_0"), ("sd15", "Q8_0"), *(("sd3", kind) for kind in KINDS)]


def change(
    pair: tuple[Any, Any], loras: list[tuple[Any, float]], load: Callable[[Any], None], model: Any
) -> Any:
    """Change of the output that the LoRAs make, on the packed and on the dense model."""
    import comfy.model_management

    changes = []
    for patcher in pair:
        load(patcher)
        before = model.run(patcher)
        comfy.model_management.unload_all_models()
        patcher.detach()
        for lora, strength in loras:
            patcher = model.with_lora(patcher, lora, strength)
        load(patcher)
        changes.append(model.run(patcher) - before)
        comfy.model_management.unload_all_models()
        patcher.detach()
    return changes


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("family", "format"), EVERY_FORMAT)
def test_one_lora(family: str, format: str, load: Callable[[Any], None], twins: Any, model: Any) -> None:
    pair = twins(family, format).load()
    packed, dense = change(pair, [(model.make_lora(pair[0].model, 1), 0.8)], load, model)
    assert dense.abs().max() > 0.05
    assert model.relative_error(packed, dense) < TOLERANCE


@pytest.mark.parametrize("load", LOADS)
def test_two_loras(sd3: Any, load: Callable[[Any], None], model: Any) -> None:
    loras = [(model.make_lora(sd3[0].model, 1), 0.8), (model.make_lora(sd3[0].model, 2), -0.5)]
    packed, dense = change(sd3, loras, load, model)
    first_only, _ = change(sd3, loras[:1], load, model)
    assert model.relative_error(packed, dense) < TOLERANCE
    assert model.relative_error(first_only, dense) > 0.1, "the second LoRA has no effect of its own"


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("family", "format"), EVERY_FORMAT)
def test_changed_and_removed_lora(
    family: str, format: str, load: Callable[[Any], None], twins: Any, model: Any
) -> None:
    """As between two runs of a workflow: the same loaded model, other patches."""
    packed, dense = twins(family, format).load()
    lora = model.make_lora(packed.model, 3)
    load(packed)
    plain = model.run(packed)
    outputs = {}
    for strength in (1.0, 0.5):
        for patcher in (packed, dense):
            patched = model.with_lora(patcher, lora, strength)
            load_whole(patched)
            outputs[patcher is packed, strength] = model.run(patched)
    load_whole(dense)
    for strength in (1.0, 0.5):
        change_dense = outputs[False, strength] - model.run(dense)
        assert model.relative_error(outputs[True, strength] - plain, change_dense) < TOLERANCE
    load_whole(packed)
    assert torch.equal(model.run(packed), plain), "removing the LoRA must restore the output exactly"


def test_weak_lora_survives_bfloat16(sd3: Any, model: Any) -> None:
    """A change far below bfloat16's grid arrives on average; added to rounded weights, most of it would be lost."""
    packed, _ = sd3
    lora = model.make_lora(packed.model, 4)
    lora = {name: value * (1e-3 if "lora_up" in name else 1) for name, value in lora.items()}
    load_whole(packed)
    before = {
        name: module.dense_weight(dtype=torch.float32) for name, module in model.packed_modules(packed.model)
    }
    load_whole(model.with_lora(packed, lora, 1.0))
    arrived = after_rounding = expected = 0.0
    for name, module in model.packed_modules(packed.model):
        wanted = module.dense_weight(dtype=torch.float32) - before[name]
        assert wanted.abs().mean() < before[name].abs().mean() / 512
        arrived += ((module.dense_weight(dtype=torch.bfloat16) - before[name]) * wanted).sum().item()
        rounded = before[name].bfloat16()
        after_rounding += ((rounded + wanted.bfloat16() - before[name]) * wanted).sum().item()
        expected += wanted.square().sum().item()
    assert arrived == pytest.approx(expected, rel=0.1)
    assert after_rounding < 0.5 * expected, "the LoRA is not weak enough to show the difference"


def test_bypass_lora(sd3: Any, model: Any) -> None:
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRA")
    lora = model.make_lora(sd3[0].model, 5)
    changes = []
    for patcher in sd3:
        before = model.run(patcher, load=True)
        patched, _ = comfy.sd.load_bypass_lora_for_models(patcher, None, dict(lora), 0.8, 0)
        changes.append(model.run(patched, load=True) - before)
    assert changes[1].abs().max() > 0.05
    assert model.relative_error(*changes) < TOLERANCE


@pytest.mark.parametrize("in_place", [False, True])
def test_weight_wrappers_with_lora(in_place: bool, sd3: Any, model: Any) -> None:
    """Functions that other nodes put around weights act on the patched weight, in place or not."""
    lora = model.make_lora(sd3[0].model, 1)
    names = [name for name, _ in model.packed_modules(sd3[0].model)]

    def wrapper(weight: torch.Tensor) -> torch.Tensor:
        return weight.mul_(1.5) if in_place else weight * 1.5

    changes = []
    for patcher in sd3:
        plain = model.run(patcher, load=True)
        patched = model.with_lora(patcher, lora)
        for name in names:
            patched.add_weight_wrapper(f"{name}.weight", wrapper)
        changes.append(model.run(patched, load=True) - plain)
    assert model.relative_error(*changes) < TOLERANCE


def test_factors_on_the_device_are_counted_once(
    sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 8 << 30)
    # Not of the largest layers: core keeps room for merging those, which takes half of so small a model.
    lora = {k: v for k, v in model.make_lora(sd3[0].model, 1).items() if ".attn." in k}
    patcher = model.with_lora(sd3[0], lora)
    patcher.load_device = torch.device("meta")
    budget = patcher.model_size() // 2
    patcher.patch_model(patcher.load_device, lowvram_model_memory=budget)
    loaded = patcher.loaded_size()
    patches = [module.weight_patches for _, module in model.packed_modules(patcher.model)]
    factors = sum(found.nbytes for found in patches if found is not None)
    assert 0 < factors <= sum(value.nbytes for value in lora.values())
    for _ in range(3):
        patcher.partially_unload(torch.device("cpu"), -1)
        assert patcher.loaded_size() == loaded


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("file", ["gguf", "dense"])
def test_plain_weights_keep_their_lora_after_unloading(
    twins: Any, file: str, load: Callable[[Any], None], model: Any
) -> None:
    """With a compute dtype, core takes layers that it has unloaded for offloaded ones, and forgets their LoRA."""
    import comfy.model_management
    from snug.nodes.adapter.loading import load_diffusion_model

    patcher = load_diffusion_model(str(getattr(twins("sd3", "Q4_0"), file)), "fp32")
    generator = torch.Generator().manual_seed(1)
    lora = {
        f"{name}.diff_b": torch.randn(layer.bias.shape, generator=generator)
        for name, layer in patcher.model.named_modules()
        if hasattr(layer, "out_features") and layer.bias is not None
    }
    before = model.run(patcher, load=True)
    patched = model.with_lora(patcher, lora)
    wanted = model.run(patched, load=True) - before
    assert wanted.abs().max() > 0.05
    comfy.model_management.unload_all_models()
    load(patched)
    assert model.relative_error(model.run(patched) - before, wanted) < TOLERANCE
