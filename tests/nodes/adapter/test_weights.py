"""The packed weight inside ComfyUI: what it is, what core counts, where it goes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from snug.quant_backends.formats import FORMATS


def packed_bytes(patcher: Any, model: Any) -> int:
    return sum(module.weight._qdata.nbytes for _, module in model.packed_modules(patcher.model))


def test_weights_are_comfy_kitchen_tensors_of_logical_shape(sd3: Any, model: Any) -> None:
    from comfy_kitchen.tensor import QuantizedTensor

    packed, dense = sd3
    wanted = {name: tuple(value.shape) for name, value in dense.model.state_dict().items()}
    modules = dict(model.packed_modules(packed.model))
    assert len(modules) > 20
    for name, module in modules.items():
        assert type(module.weight) is QuantizedTensor
        assert tuple(module.weight.shape) == wanted[f"{name}.weight"]
        assert module.weight.dtype == torch.float32, "decodes to what the model calculates in"


def test_state_dict_keys_are_those_of_the_dense_model(sd3: Any) -> None:
    packed, dense = sd3
    assert list(packed.model.state_dict()) == list(dense.model.state_dict())


def test_core_counts_the_packed_size(sd3: Any, model: Any) -> None:
    import comfy.model_management as management

    packed, dense = sd3
    weights = packed_bytes(packed, model)
    modules = [module for _, module in model.packed_modules(packed.model)]
    logical = sum(module.weight.numel() for module in modules)
    assert weights == sum(FORMATS[m.weight.params.format].nbytes(m.weight.shape) for m in modules)
    assert {module.weight.params.format for module in modules} == {"Q4_0", "F16"}
    rest = management.module_size(dense.model) - 4 * logical
    assert management.module_size(packed.model) == weights + rest
    assert packed.model_size() == weights + rest
    assert packed.clone().model_size() == weights + rest
    management.load_models_gpu([packed])
    assert packed.loaded_size() == weights + rest


def test_partial_load_counts_the_packed_size(sd3: Any) -> None:
    packed, _ = sd3
    budget = packed.model_size() // 2
    packed.patch_model(packed.load_device, lowvram_model_memory=budget)
    assert budget // 4 < packed.loaded_size() <= budget
    freed = packed.partially_unload(packed.offload_device, packed.loaded_size() // 2)
    assert freed > 0
    packed.detach()


def test_weights_stay_views_of_the_mapped_file(sd3: Any, model: Any) -> None:
    """No copy is made on the way from the file: all weights lie in one mapping."""
    addresses = sorted(module.weight._qdata.data_ptr() for _, module in model.packed_modules(sd3[0].model))
    assert addresses[-1] - addresses[0] < sd3[0].model_size()


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_prediction_equals_the_dense_model(family: str, request: Any, model: Any) -> None:
    packed, dense = request.getfixturevalue(family)
    assert torch.allclose(model.run(packed, load=True), model.run(dense, load=True), rtol=1e-5, atol=1e-5)


def test_moving_the_model_moves_the_bytes(sd3: Any, model: Any) -> None:
    packed, _ = sd3
    packed.model.to("meta")
    for _, module in model.packed_modules(packed.model):
        assert module.weight.device.type == "meta"
        assert module.weight._qdata.device.type == "meta"


def test_casting_the_model_changes_only_the_dtype_it_decodes_to(sd3: Any, model: Any) -> None:
    packed, _ = sd3
    name, module = next(model.packed_modules(packed.model))
    data = module.weight._qdata
    packed.model.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight._qdata, data)
    assert module.dense_weight().dtype == torch.bfloat16


def test_deepcopy_is_independent_and_equal(sd3: Any, model: Any) -> None:
    """Of the network itself: newer ComfyUI's model object around it cannot be deep-copied, dense or not."""
    packed, _ = sd3
    before = model.run(packed, load=True)
    original = packed.model.diffusion_model
    twin = copy.deepcopy(original)
    modules = dict(model.packed_modules(original))
    for name, module in model.packed_modules(twin):
        assert torch.equal(module.weight._qdata, modules[name].weight._qdata)
        assert module.weight._qdata.data_ptr() != modules[name].weight._qdata.data_ptr()
    for module in modules.values():
        module.weight._qdata.zero_()
    packed.model.diffusion_model = twin
    assert torch.equal(model.run(packed), before)


def test_state_dict_loads_into_another_model_packed(twins: Any, model: Any) -> None:
    (first, _), (second, _) = twins("sd3", "Q4_0").load(), twins("sd3", "Q4_0").load()
    for _, module in model.packed_modules(second.model):
        module.weight = torch.nn.Parameter(torch.zeros(module.weight.shape), requires_grad=False)
    second.model.load_state_dict(first.model.state_dict())
    assert len(list(model.packed_modules(second.model))) == len(list(model.packed_modules(first.model)))
    assert torch.equal(model.run(second), model.run(first))


def test_two_loads_share_no_settings(twins: Any, model: Any) -> None:
    (first, _), (second, _) = twins("sd3", "Q4_0").load(), twins("sd3", "Q4_0").load()
    classes = [{type(m) for _, m in model.packed_modules(p.model)} for p in (first, second)]
    assert classes[0].isdisjoint(classes[1])


def test_loading_moves_packed_weights_through_pinned_buffers(sd3: Any, model: Any, monkeypatch: Any) -> None:
    """What a GPU gets; here the device has no memory."""
    packed, _ = sd3
    opened: list[Any] = []
    moved: list[torch.Tensor] = []

    @contextmanager
    def open_for(device: Any) -> Iterator[None]:
        opened.append(device)
        yield
        opened.append("closed")

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(tensor)
        return tensor.to(device)

    monkeypatch.setattr("snug.nodes.adapter.patcher.staged_copies", open_for)
    monkeypatch.setattr("snug.nodes.adapter.layout.staged", to_device)
    packed.load(packed.load_device)
    assert opened == [packed.load_device, "closed"]
    module = copy.deepcopy(next(module for _, module in model.packed_modules(packed.model)))
    module.to("cpu", torch.float64)
    assert moved == []
    codes, format = module.weight._qdata, module.weight.params.format
    module.to("meta")
    assert [tensor.data_ptr() for tensor in moved] == [codes.data_ptr()]
    assert module.weight.is_meta and module.weight._qdata.is_meta and module.weight.dtype == torch.float64
    assert module.weight.params.format == format
