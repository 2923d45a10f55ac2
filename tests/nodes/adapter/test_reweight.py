"""A second model beside the first: everything that refers to its modules refers to the copies, tensors are shared."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from fake_paging import fake_paging


def reweight(patcher: Any, choose: Any = None) -> Any:
    from snug.nodes.adapter.reweight import reweight

    return reweight(patcher, choose or to_rows)


def to_rows(name: str, layer: Any) -> Any:
    """float8 for the attention alone."""
    from snug.quant_backends.formats.scaled import scaled_format
    from snug.quant_backends.kernels.dequantize import quantize_packed

    return quantize_packed(layer.weight, scaled_format("float8_e4m3fn-rows")) if "attn" in name else None


def doubled(name: str, layer: Any) -> Any:
    """Another plain weight."""
    return layer.weight.detach() * 2 if name.endswith("attn.qkv") else None


class Inner(torch.nn.Module):
    def __init__(self, table: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = table
        self.register_buffer("steps", torch.arange(3))

    def double(self) -> torch.Tensor:
        return self.weight * 2


class Outer(torch.nn.Module):
    """References of every kind that models of ComfyUI have."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.parts = torch.nn.ModuleList([Inner(table), Inner(table)])
        self.by_name = {"first": self.parts[0], "both": [self.parts[0], (self.parts[1],)]}
        self.call = self.parts[1].double
        self.outside = types.SimpleNamespace(kept=True)
        self.cache: list[int] = []
        self.current_patcher = self


def test_references_lead_to_the_copies(comfy: Any) -> None:
    from snug.nodes.adapter.model_copy import ModelCopy

    model: Any = Outer()
    first: Any = model.parts[0]
    first.comfy_patched_weights = first.comfy_cast_weights = True
    first.prev_comfy_cast_weights = False
    copied = ModelCopy(model)
    twin: Any = copied.model
    assert type(twin) is Outer and twin.current_patcher is None
    assert twin.parts[0] is not model.parts[0]
    assert twin.by_name["first"] is twin.parts[0]
    assert twin.by_name["both"] == [twin.parts[0], (twin.parts[1],)]
    assert twin.call.__self__ is twin.parts[1]
    assert twin.outside is model.outside
    assert twin.cache == [] and twin.cache is not model.cache
    assert twin.parts[0].weight is twin.parts[1].weight, "tied weights stay tied"
    assert twin.parts[0].weight is not model.parts[0].weight
    assert len({part.get_parameter("weight").data_ptr() for part in (*twin.parts, *model.parts)}) == 1
    assert twin.parts[0].steps is model.parts[0].steps
    assert not hasattr(twin.parts[0], "comfy_patched_weights")
    assert twin.parts[0].comfy_cast_weights is False
    assert copied.counterpart(model.call).__self__ is twin.parts[1]
    foreign: Any = torch.nn.Linear(1, 1)
    assert copied.counterpart([foreign]) == [foreign]


def test_plain_weights(sd3: Any, model: Any) -> None:
    _, dense = sd3
    new = reweight(dense, doubled)
    found = model.run(new, load=True)
    before = model.run(dense, load=True)
    for name, layer in dense.model.named_modules():
        if name.endswith("attn.qkv"):
            layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)
    assert model.relative_error(found, model.run(dense, load=True)) < 1e-5
    assert model.relative_error(found, before) > 1e-3


def test_nothing_chosen_is_the_same_model(sd3: Any, model: Any) -> None:
    for patcher in sd3:
        new = reweight(patcher, lambda name, layer: None)
        assert new.model is not patcher.model and not new.is_clone(patcher)
        assert new.parent is None, "ComfyUI would unload the other model in its place"
        assert new.model_size() == patcher.model_size()
        assert torch.equal(model.run(new, load=True), model.run(patcher, load=True))


def test_tied_weights_are_chosen_once(sd3: Any, model: Any) -> None:
    _, dense = sd3
    layers = [m for name, m in dense.model.named_modules() if name.endswith("x_block.attn.qkv")]
    layers[1].weight = layers[0].weight
    asked: list[str] = []
    new = reweight(dense, lambda name, layer: asked.append(name) or to_rows(name, layer))
    weights = [m.weight for name, m in new.model.named_modules() if name.endswith("x_block.attn.qkv")]
    assert weights[0] is weights[1]
    assert len([name for name in asked if name.endswith("x_block.attn.qkv")]) == len(layers) - 1


def test_loaded_with_a_lora_at_that_moment(sd3: Any, model: Any) -> None:
    """Core has merged it into the weights; the copy must come from the originals."""
    import comfy.model_management

    packed, dense = sd3
    wanted = model.run(reweight(dense), load=True)
    patched = model.with_lora(dense, model.make_lora(packed.model, 1))
    for load in (comfy.model_management.load_models_gpu, lambda patchers: patchers[0].patch_model()):
        load([patched])
        assert dense.backup, "core merges"
        assert torch.equal(model.run(reweight(dense), load=True), wanted)


def test_bypass_lora_comes_along(sd3: Any, model: Any) -> None:
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRA")
    packed, dense = sd3
    lora = model.make_lora(packed.model, 5)
    before = model.run(dense, load=True)
    patched, _ = comfy.sd.load_bypass_lora_for_models(dense, None, dict(lora), 0.8, 0)
    change = model.run(patched, load=True) - before
    new = reweight(patched)
    found = model.run(new, load=True) - model.run(reweight(dense), load=True)
    assert change.abs().max() > 0.05
    assert model.relative_error(found, change) < 0.05
    assert torch.equal(model.run(dense, load=True), before)


def test_compiled_models_are_compiled_anew(sd3: Any, model: Any) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    _, dense = sd3
    compiled = dense.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model"])
    new = reweight(compiled)
    (wrapper,) = next(iter(new.wrappers["apply_model"].values()))
    modules = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__, strict=True))
    module = modules["compiled_module_dict"].cell_contents["diffusion_model"]
    assert module._orig_mod is new.model.diffusion_model


def test_object_patches_come_along(sd3: Any, model: Any) -> None:
    _, dense = sd3
    source = dense.clone()
    sampling, network = source.get_model_object("model_sampling"), source.model.diffusion_model
    source.add_object_patch("diffusion_model.final_layer.forward", network.final_layer.forward)
    source.model_options["transformer_options"]["mark"] = [1]
    new = reweight(source)
    assert (
        new.object_patches["diffusion_model.final_layer.forward"].__self__
        is new.model.diffusion_model.final_layer
    )
    assert new.model.model_sampling is not sampling
    assert new.model_options["transformer_options"]["mark"] == [1]
    model.run(new, load=True)


def test_weight_hooks(sd3: Any, model: Any) -> None:
    """Patches for a part of the sampling, registered before."""
    import comfy.hooks

    packed, dense = sd3
    lora = model.make_lora(packed.model, 1)
    diffs = {}
    for name, _ in model.packed_modules(packed.model):
        up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
        diffs[f"{name}.weight"] = ("diff", (up @ down,))
    hook = comfy.hooks.WeightHook(strength_model=0.5)
    hook.weights, hook.need_weight_init = diffs, False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    changes = []
    new = reweight(dense)
    for patcher in (dense, new):
        plain = model.run(patcher, load=True)
        patcher = patcher.clone()
        patcher.add_hook_patches(hook, diffs, 0.5)
        import comfy.model_management

        comfy.model_management.load_models_gpu([patcher])
        patcher.patch_hooks(group)
        changes.append(model.run(patcher) - plain)
        comfy.model_management.load_models_gpu([new.clone()])  # between two steps, or after a cancelled run
        patcher.clean_hooks()
        assert torch.equal(model.run(patcher), plain)
    assert changes[0].abs().max() > 0.05
    assert model.relative_error(changes[1], changes[0]) < 0.05


@pytest.fixture
def dynamic(sd15: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """core's dense model in its ModelPatcherDynamic, loaded."""
    fake_paging(monkeypatch)
    import comfy.model_patcher

    patcher = comfy.model_patcher.ModelPatcherDynamic(
        sd15[1].model, torch.device("meta"), torch.device("cpu")
    )
    patcher.partially_load(patcher.load_device)
    return patcher


def test_dynamic_vram(dynamic: Any, model: Any) -> None:
    before = dict(dynamic.model.named_parameters())
    assert dynamic.backup
    new = reweight(dynamic)
    assert new.is_dynamic() and type(new).__name__ == "SnugModelPatcherDynamic"
    assert not any(parameter.is_meta for parameter in new.model.parameters())
    assert not any(hasattr(module, "_v") for module in new.model.modules())
    assert new.model.dynamic_vbars == {} and new.model.dynamic_pins.keys() == {new.load_device}
    assert new.model.dynamic_patchers == {id(new)}
    patched = model.with_lora(new, model.make_lora(new.model, 1))
    patched.partially_load(patched.load_device)
    for _, module in model.packed_modules(new.model):
        assert module.weight_patches is not None and module.weight._qdata.device.type == "cpu"
    assert before.keys() == dict(dynamic.model.named_parameters()).keys()
    static = patched.clone(disable_dynamic=True)
    assert not static.is_dynamic() and static.model is not new.model
    found = dict(model.packed_modules(static.model))
    for name, module in model.packed_modules(new.model):
        assert found[name].weight._qdata.data_ptr() == module.weight._qdata.data_ptr()
        assert found[name].weight_patches is None


def test_rebuilt_model_predicts_the_same(sd3: Any, model: Any) -> None:
    new = reweight(sd3[1])
    wanted = model.run(new, load=True)
    function, arguments = new.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert again.model is not new.model
    assert torch.equal(model.run(again, load=True), wanted)
    assert torch.equal(model.run(new, load=True), wanted)
