"""Copies of weights in spare memory: the same results bit for bit, within their limit, and given back when asked."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from compiled_models import predict
from fake_paging import fake_paging
from memory_states import load_half, load_whole
from narrow_models import accept_narrow_models
from simulated_gpu import SimulatedGPU

FAMILIES = [("sd3", "Q4_K"), ("flux", "nf4"), ("wan", "Q8_0"), ("sd15", "Q8_0")]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    accept_narrow_models(monkeypatch)


def cached(patcher: Any, limit_gb: float = 0.0) -> Any:
    from snug.nodes.adapter.spare_memory_report import set_spare_memory

    return set_spare_memory(patcher, limit_gb)[0]


def run(patcher: Any, family: str, side: int = 8) -> torch.Tensor:
    load_whole(patcher)
    patcher.model.current_patcher = patcher
    return predict(patcher, family, side=side)


def held(patcher: Any) -> int:
    from snug.nodes.adapter.weight_copies import copies_of

    copies = copies_of(patcher.model)
    return 0 if copies is None else copies.nbytes


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each weight that is decoded for a layer."""
    calls: list[int] = []
    for name in ("nodes.adapter.layout", "nodes.adapter.spare_memory", "quant_backends.kernels.linear"):
        module = importlib.import_module(f"snug.{name}")
        original = module.dequantize_packed

        def spy(packed: Any, *rest: Any, original: Any = original, **more: Any) -> Any:
            calls.append(packed.nbytes)
            return original(packed, *rest, **more)

        monkeypatch.setattr(module, "dequantize_packed", spy)
    return calls


@pytest.mark.parametrize(("family", "format"), FAMILIES)
def test_same_results_and_nothing_is_decoded_again(
    family: str, format: str, twins: Any, decoded: list[int]
) -> None:
    packed, _ = twins(family, format).load()
    exact = run(packed, family)
    chosen = cached(packed)
    before = chosen.loaded_size()
    decoded.clear()
    assert torch.equal(run(chosen, family), exact)
    first = len(decoded)
    assert first and held(chosen)
    assert chosen.loaded_size() == before + held(chosen), "ComfyUI must know of the memory"
    assert torch.equal(run(chosen, family), exact)
    embeddings = len(decoded) - first
    assert embeddings * 10 < first, "decoded again"


@pytest.mark.parametrize("mode", ["merge while dequantizing", "side branch", "automatic"])
def test_lora_of_every_mode(mode: str, sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.nodes.adapter.lora_mode import set_lora_mode
    from snug.nodes.adapter.side_branch import SideBranch

    if mode == "automatic":  # as for many tokens: there is a branch, but the weight is merged
        monkeypatch.setattr(SideBranch, "applies", lambda *_: False)
    packed, _ = sd3
    base, _ = set_lora_mode(packed, mode, False)
    lora = model.make_lora(packed.model, 1)
    chosen = cached(base)
    exact = {strength: run(model.with_lora(base, lora, strength), "sd3") for strength in (0.3, 0.8)}
    plain = run(base, "sd3")
    assert torch.equal(run(chosen, "sd3"), plain)
    for strength in (0.3, 0.8, 0.3):
        assert torch.equal(run(model.with_lora(chosen, lora, strength), "sd3"), exact[strength])
        assert held(chosen)
    assert torch.equal(run(chosen, "sd3"), plain)
    assert torch.equal(run(base, "sd3"), plain)


def test_inputs_of_another_dtype(sd3: Any) -> None:
    packed, _ = sd3
    chosen = cached(packed)
    run(chosen, "sd3")
    layer = chosen.model.get_submodule("diffusion_model.joint_blocks.0.x_block.mlp.fc1")
    x = torch.randn(4, layer.in_features, dtype=torch.bfloat16)
    with torch.inference_mode():
        found, layer.weight_copy = layer(x), None
        assert found.dtype == x.dtype and torch.equal(found, layer(x))


def test_another_way_of_applying_lora_gives_back_the_copies_of_its_layers(sd3: Any, model: Any) -> None:
    """ComfyUI loads nothing anew for that."""
    from snug.nodes.adapter.lora_mode import set_lora_mode

    packed, _ = sd3
    merged = cached(model.with_lora(packed, model.make_lora(packed.model, 1)))
    exact = run(merged, "sd3")
    layers: list[Any] = [m for _, m in model.packed_modules(merged.model) if m.weight_copy is not None]
    linear = [layer for layer in layers if layer.weight.dim() == 2]
    assert linear and all(layer.weight_copy.patches is layer.weight_patches for layer in layers)
    beside, _ = set_lora_mode(merged, "side branch", False)
    load_whole(beside)
    assert all(layer.weight_copy is None for layer in linear)
    assert model.relative_error(run(beside, "sd3"), exact) < 1e-4
    assert all(layer.weight_copy.patches is None for layer in linear)
    assert torch.equal(run(merged, "sd3"), exact)


def test_within_the_limit_and_the_dearest_first(sd3: Any, model: Any) -> None:
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_model

    packed, dense = sd3
    names = [f"joint_blocks.{block}.x_block.mlp.fc1" for block in range(4)]
    # Half of the layers in a format that is decoded faster.
    mixed, _ = quantize_model(dense, QuantizeSettings("GGUF Q8_0", r"joint_blocks\.[23]"))
    mixed, _ = quantize_model(mixed, QuantizeSettings("GGUF Q5_K", "default"))
    layers = [mixed.model.get_submodule(f"diffusion_model.{name}") for name in names]
    formats = [layer.weight.params.format for layer in layers]
    assert formats == ["Q8_0", "Q8_0", "Q5_K", "Q5_K"]
    sizes = {}
    for _, layer in model.packed_modules(mixed.model):
        fmt = layer.weight.params.format
        sizes[fmt] = sizes.get(fmt, 0) + layer.weight.numel() * 4
    limit = sizes["Q5_K"] + sizes["Q8_0"] // 2
    chosen = cached(mixed, limit / 2**30)
    run(chosen, "sd3")
    assert sizes["Q5_K"] < held(chosen) <= limit
    run(cached(mixed), "sd3")
    assert held(chosen) > limit
    run(chosen, "sd3")
    assert sizes["Q5_K"] < held(chosen) <= limit, "a lower limit takes what another clone has kept"
    kept = [layer for _, layer in model.packed_modules(mixed.model) if layer.weight_copy is not None]
    assert sum(layer.weight.params.format == "Q5_K" for layer in kept) == sum(
        layer.weight.params.format == "Q5_K" for _, layer in model.packed_modules(mixed.model)
    )


def test_given_back_as_far_as_comfyui_asks(sd3: Any, model: Any) -> None:
    packed, _ = sd3
    exact = run(packed, "sd3")
    weights = packed.loaded_size()
    chosen = cached(packed)
    assert torch.equal(run(chosen, "sd3"), exact)
    before = held(chosen)
    freed = chosen.partially_unload(chosen.offload_device, before // 3)
    assert before // 3 <= freed < before
    assert held(chosen) == before - freed
    assert chosen.loaded_size() == weights + held(chosen)
    assert torch.equal(predict(chosen, "sd3"), exact)
    assert held(chosen) == before - freed, "taken back while ComfyUI needs the memory"
    # Another clone of the model is asked just as well, and the next use of the model fills up again.
    packed.partially_unload(packed.offload_device, before)
    assert not held(chosen)
    assert torch.equal(run(chosen, "sd3"), exact)
    assert held(chosen) == before
    importlib.import_module("comfy.model_management").unload_all_models()
    assert not held(chosen)
    assert all(layer.weight_copy is None for _, layer in model.packed_modules(chosen.model))


def test_another_model_takes_the_memory(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ComfyUI's own memory management, on a GPU that is simulated."""
    management = importlib.import_module("comfy.model_management")
    packed, _ = twins("sd3", "Q4_0").load()
    _, other = twins("sd3", "Q8_0").load()
    exact = run(packed, "sd3")
    management.unload_all_models()
    gpu = SimulatedGPU(monkeypatch, 1 << 30, 16 << 20, 16 << 20)
    chosen = cached(packed)
    gpu.holds(chosen, other)
    monkeypatch.setattr(chosen.model, "memory_required", lambda *_, **__: 16 << 20)
    management.load_models_gpu([chosen])
    assert torch.equal(predict(chosen, "sd3"), exact)
    copies = held(chosen)
    assert copies and gpu.used == packed.model_size() + copies
    gpu.total = gpu.used + (40 << 20)
    management.load_models_gpu([other])
    assert held(chosen) < copies
    assert chosen.model.model_loaded_weight_memory - held(chosen) == packed.model_size(), "weights went first"
    assert torch.equal(predict(chosen, "sd3"), exact)


def test_when_memory_runs_out(sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    management = importlib.import_module("comfy.model_management")
    packed, _ = sd3
    exact = run(packed, "sd3")
    chosen = cached(packed)
    run(chosen, "sd3")
    held_before = held(chosen)

    def full(*_: Any) -> None:
        if held(chosen):
            raise management.OOM_EXCEPTION("no memory")

    block = chosen.model.diffusion_model.joint_blocks[1]
    handle = block.register_forward_pre_hook(full)
    try:
        assert torch.equal(predict(chosen, "sd3"), exact)
        assert held_before and not held(chosen)
        assert torch.equal(predict(chosen, "sd3"), exact)
        assert not held(chosen)
    finally:
        handle.remove()
    assert torch.equal(run(chosen, "sd3"), exact)
    assert held(chosen) == held_before
    monkeypatch.setattr(block, "forward", Mock(side_effect=management.OOM_EXCEPTION("no memory")))
    with pytest.raises(management.OOM_EXCEPTION):  # as copies were not to blame
        predict(chosen, "sd3")


def test_nothing_is_kept_where_memory_is_short_or_budgeted(sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.nodes.adapter.memory_budget_patcher import Allowance, with_allowance

    management = importlib.import_module("comfy.model_management")
    packed, _ = sd3
    exact = run(packed, "sd3")
    budgeted = [
        with_allowance(cached(packed), Allowance(0, 0)),
        cached(with_allowance(packed, Allowance(0, 0))),
    ]
    for patcher in budgeted:
        assert torch.equal(run(patcher, "sd3"), exact)
        assert not held(patcher)
    chosen = cached(packed)
    load_whole(chosen)
    chosen.model.current_patcher = chosen
    free = management.get_free_memory
    monkeypatch.setattr(management, "get_free_memory", lambda *rest: free(*rest) if rest[1:] else 1 << 30)
    assert torch.equal(predict(chosen, "sd3"), exact)
    assert not held(chosen)


def test_beside_weight_hooks(sd3: Any, model: Any) -> None:
    """Patches for a part of the steps go before the copies."""
    packed, _ = sd3
    chosen = cached(packed)
    plain = run(chosen, "sd3")
    _, layer = next(iter(model.packed_modules(chosen.model)))
    assert layer.weight_copy is not None
    kept = layer.weight_for(torch.zeros(1, dtype=torch.float32), layer.weight)
    layer.hook_patches = lambda weight: weight * 2
    try:
        assert torch.equal(layer.weight_for(torch.zeros(1), layer.weight), kept * 2)
    finally:
        layer.hook_patches = None
    assert torch.equal(predict(chosen, "sd3"), plain)


def test_a_model_that_nobody_needs_is_gone_at_once() -> None:
    """Without waiting for the garbage collector, as its memory is wanted."""
    from snug.nodes.adapter.weight_copies import Copies

    model = torch.nn.Linear(2, 2)
    model.model_loaded_weight_memory = 0  # type: ignore[assignment]
    model.__dict__["copies"] = Copies(model)
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


def test_copies_stay_behind_when_a_model_is_copied(sd3: Any, model: Any) -> None:
    from snug.nodes.adapter.model_copy import ModelCopy

    packed, _ = sd3
    chosen = cached(packed)
    run(chosen, "sd3")
    name, layer = next(iter(model.packed_modules(chosen.model)))
    assert layer.weight_copy is not None
    assert copy.deepcopy(layer).weight_copy is None
    twin = ModelCopy(chosen.model).model
    assert twin.get_submodule(name).weight_copy is None
    assert "snug_weight_copies" not in twin.__dict__


def test_together_with_fast_matmul(sd3: Any, model: Any) -> None:
    """Rounded weights for the layers that multiply in 8 bits, decoded ones for the others; in either order."""
    from snug.nodes.adapter.fast_matmul import set_fast_matmul

    packed, _ = sd3
    alone = set_fast_matmul(packed, "int8", "default", True)[0]
    wanted = run(alone, "sd3", 16)
    only_rounded = held(alone)
    for chosen in (cached(alone), set_fast_matmul(cached(packed), "int8", "default", True)[0]):
        assert torch.equal(run(chosen, "sd3", 16), wanted)
        copies = [layer.weight_copy for _, layer in model.packed_modules(chosen.model)]
        assert sum(found is not None and found.rounded is not None for found in copies) == 16
        assert sum(found is not None and found.dense is not None for found in copies) > 16
        assert held(chosen) > only_rounded
    exact = run(cached(packed), "sd3", 16)
    assert torch.equal(exact, run(packed, "sd3", 16)), "a rounded copy is no decoded one"


def test_with_dynamic_vram_they_are_given_back_after_sampling(
    sd3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI asks no paged model for memory: it takes the pages away."""
    from snug.nodes.adapter.patcher import adopt
    from snug.nodes.adapter.weight_copies import WeightCopy, copies_of

    fake_paging(monkeypatch)
    dynamic = importlib.import_module("comfy.model_patcher").ModelPatcherDynamic
    chosen = cached(adopt(dynamic(sd3[0].model, torch.device("meta"), torch.device("cpu"))))
    chosen.partially_load(chosen.load_device)
    before = chosen.model.model_loaded_weight_memory
    layer = chosen.model.get_submodule("diffusion_model.joint_blocks.0.x_block.attn.qkv")
    copies = copies_of(chosen.model, make=True)
    assert copies is not None
    copies.add(layer, WeightCopy(torch.zeros(8, 8)), 1.0)
    copies.count()
    assert chosen.model.model_loaded_weight_memory == before + 256
    chosen.cleanup()
    assert layer.weight_copy is None and not held(chosen)
    assert chosen.model.model_loaded_weight_memory == before


def test_reports(sd3: Any, twins: Any) -> None:
    from snug.nodes.adapter.spare_memory_report import set_spare_memory

    packed, dense = sd3
    text = set_spare_memory(packed, 0.5)[1]
    assert "copies of the weights of" in text and "0.5 GB at most" in text and "free now on cpu" in text
    assert "nothing to keep" in set_spare_memory(dense, 0)[1]


def test_half_loaded(sd3: Any) -> None:
    packed, _ = sd3
    exact = run(packed, "sd3")
    importlib.import_module("comfy.model_management").unload_all_models()
    chosen = cached(packed)
    load_half(chosen)
    assert torch.equal(predict(chosen, "sd3"), exact)
