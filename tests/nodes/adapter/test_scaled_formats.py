"""Quantized safetensors of every library as native models: the prediction, the size and the moves of their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from quantized_files import KINDS
from twins import Twins

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def pair(kind: str, twins: Callable[[str, str], Twins]) -> tuple[Any, Any]:
    """(packed, dense) patchers of a tiny SD3 in `kind`."""
    return twins("sd3", kind).load()


def stored(weight: Any) -> list[torch.Tensor]:
    return [weight._qdata, *weight.params.parts.values()]


def test_parts_are_kept_where_the_format_has_them(twins: Callable[[str, str], Twins], model: Any) -> None:
    packed, _ = twins("sd3", "nf4-nested").load()
    names = {frozenset(module.weight.params.parts) for _, module in model.packed_modules(packed.model)}
    assert names == {frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset"})}


@every_kind
@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_prediction_equals_the_dense_model(family: str, kind: str, twins: Any, model: Any) -> None:
    packed, dense = twins(family, kind).load()
    assert torch.allclose(model.run(packed, load=True), model.run(dense, load=True), rtol=1e-5, atol=1e-5)


@every_kind
def test_prediction_when_every_layer_is_offloaded(pair: Any, model: Any) -> None:
    packed, dense = pair
    packed.patch_model(packed.load_device, lowvram_model_memory=1)
    assert packed.model.model_lowvram
    assert torch.allclose(model.run(packed), model.run(dense, load=True), rtol=1e-5, atol=1e-5)
    packed.detach()


@every_kind
def test_core_counts_codes_and_scales(kind: str, pair: Any, twins: Any, model: Any) -> None:
    import comfy.model_management as management

    packed, dense = pair
    files = twins("sd3", kind)
    modules = [module.weight for _, module in model.packed_modules(packed.model)]
    weights, logical = sum(t.nbytes for w in modules for t in stored(w)), sum(w.numel() for w in modules)
    # Matrices of 16 bits that the library did not quantize stay as they are in the file as well.
    assert weights == files.packed_bytes + 2 * (logical - files.packed_weights)
    rest = management.module_size(dense.model) - 4 * logical
    assert packed.model_size() == management.module_size(packed.model) == weights + rest
    management.load_models_gpu([packed])
    assert packed.loaded_size() == weights + rest


@every_kind
def test_codes_and_large_scales_stay_in_the_mapped_file(pair: Any, model: Any) -> None:
    """Making a weight a parameter and setting what it decodes to must not copy them into memory of their own."""
    packed, _ = pair
    maps = list(mapped_files())
    for _, module in model.packed_modules(packed.model):
        for tensor in stored(module.weight):
            if tensor.nbytes >= 64:  # less is made from a number in the file's JSON
                assert any(start <= tensor.data_ptr() < stop for start, stop in maps)


def mapped_files() -> Iterator[tuple[int, int]]:
    """Address ranges at which a safetensors file is mapped."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            if line.rstrip().endswith(".safetensors"):
                start, stop = line.split()[0].split("-")
                yield int(start, 16), int(stop, 16)


@every_kind
def test_moving_the_model_moves_the_scales(pair: Any, model: Any) -> None:
    packed, _ = pair
    packed.model.to("meta")
    for _, module in model.packed_modules(packed.model):
        assert {tensor.device.type for tensor in stored(module.weight)} == {"meta"}


@every_kind
def test_a_copy_is_independent(pair: Any, model: Any) -> None:
    """copy_ into a copy, as ComfyUI fills its buffers, must not write into the original's scales."""
    packed, _ = pair
    _, module = next(model.packed_modules(packed.model))
    before = module.dense_weight()
    twin = copy.deepcopy(module)
    other = module.weight.detach().clone()
    for tensor in stored(other):
        assert tensor.device.type == "cpu"
    changed = torch.empty_like(module.weight)
    changed.copy_(other)
    assert torch.equal(changed.dequantize(), before)
    module_parts = {tensor.data_ptr() for tensor in stored(module.weight)}
    assert module_parts.isdisjoint(tensor.data_ptr() for tensor in stored(changed))
    module.weight._qdata.zero_()
    assert torch.equal(twin.dense_weight(), before)


@every_kind
def test_saved_models_are_dense_and_equal(pair: Any, model: Any) -> None:
    packed, _ = pair
    saved = packed.model.state_dict()
    for name, module in model.packed_modules(packed.model):
        value = saved[f"{name}.weight"]
        assert value.shape == module.weight.shape
        assert torch.equal(value.to("cpu"), module.dense_weight())


@every_kind
def test_weights_pass_through_the_buffers_of_dynamic_vram(pair: Any, model: Any) -> None:
    """Core gathers a layer's tensors in one buffer of bytes and looks at them there: it must hold all of them."""
    memory = pytest.importorskip("comfy.memory_management", reason="this ComfyUI has no dynamic VRAM")
    packed, _ = pair
    for _, module in model.packed_modules(packed.model):
        buffer = torch.zeros(memory.vram_aligned_size(module.weight), dtype=torch.uint8)
        (place,) = memory.interpret_gathered_like([module.weight], buffer)
        place.copy_(module.weight)
        (seen,) = memory.interpret_gathered_like([module.weight], buffer)
        assert torch.equal(seen.dequantize(), module.dense_weight())
