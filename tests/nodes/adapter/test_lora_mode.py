"""LoRA modes: each equals the dense model with the LoRA merged, however loaded, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_files import COSTLY, make_adapter
from compiled_models import compiled, compiles, fresh_compiler, predict  # noqa: F401
from memory_states import LOADS, load_nothing, load_whole

EXACT = ["automatic", "merge while dequantizing", "side branch"]
MERGE, BRANCH = EXACT[1:]
FORMATS = [
    ("sd3", "Q8_0"),
    ("sd3", "Q4_K"),
    ("sd3", "nf4"),
    ("sd3", "int8"),
    ("sd3", "fp8"),
    ("sd15", "Q8_0"),
]
TOLERANCE = 1e-4


def with_mode(patcher: Any, mode: str, cache: bool = True) -> Any:
    from snug.nodes.adapter.lora_mode import set_lora_mode

    return set_lora_mode(patcher, mode, cache)[0]


def release(patcher: Any) -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    patcher.detach()


def layers_of(patcher: Any, model: Any) -> dict[str, Any]:
    return dict(model.packed_modules(patcher.model))


def adapted(patcher: Any, *adapters: dict[str, torch.Tensor], strength: float = 0.7) -> Any:
    """A clone with files of any kind of adapter on it."""
    import comfy.sd

    for tensors in adapters:
        before = dict(patcher.patches)
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, dict(tensors), strength, 0)
        assert patcher.patches != before, "ComfyUI has not recognised the adapter"
    return patcher


def shapes_of(patcher: Any, model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.weight.shape) for name, layer in layers_of(patcher, model).items()}


@pytest.fixture
def branched(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that have gone through a side branch."""
    from snug.nodes.adapter.side_branch import SideBranch

    shapes: list[torch.Size] = []
    add_to = SideBranch.add_to

    def spy(self: Any, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return add_to(self, output, x)

    monkeypatch.setattr(SideBranch, "add_to", spy)
    return shapes


# ---- plain LoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize(("family", "format"), FORMATS)
def test_equals_the_dense_model(
    family: str, format: str, mode: str, twins: Any, model: Any, branched: list[torch.Size]
) -> None:
    packed, dense = twins(family, format).load()
    lora, other = (model.make_lora(packed.model, seed) for seed in (1, 2))
    before, plain = model.run(dense, load=True), model.run(packed, load=True)
    as_today = model.run(model.with_lora(packed, lora, 0.8), load=True)
    chosen = with_mode(packed, mode)
    for loras in ([(lora, 0.8)], [(lora, 0.8), (other, -0.5)], [(lora, 0.3)]):
        patched, wanted = chosen, dense
        for weights, strength in loras:
            patched, wanted = (model.with_lora(p, weights, strength) for p in (patched, wanted))
        output = model.run(wanted, load=True)
        assert model.relative_error(output, before) > 0.01
        for load in LOADS:
            branched.clear()
            load(patched)
            found = model.run(patched)
            assert model.relative_error(found, output) < TOLERANCE, (len(loras), load.__name__)
            assert bool(branched) == (mode != MERGE)
            release(patched)
    assert torch.equal(model.run(chosen, load=True), plain), "without LoRA the mode must change nothing"
    assert torch.equal(model.run(packed, load=True), plain), "the given model has changed"
    assert torch.equal(model.run(model.with_lora(packed, lora, 0.8), load=True), as_today)


def test_every_linear_layer_takes_the_branch_and_automatic_chooses(
    sd3: Any, model: Any, branched: list[torch.Size]
) -> None:
    from snug.quant_backends.kernels.low_rank import LowRankShape

    packed, _ = sd3
    patched = model.with_lora(with_mode(packed, BRANCH), model.make_lora(packed.model, 1))
    model.run(patched, load=True)
    assert len(branched) == len(layers_of(packed, model))
    patched = model.with_lora(with_mode(packed, "automatic"), model.make_lora(packed.model, 1))
    load_whole(patched)
    layer = max(layers_of(patched, model).values(), key=lambda layer: layer.in_features)
    shape = LowRankShape(layer.out_features, layer.in_features, 4)
    few, many = 1, 1 << 14
    assert shape.branch_pays(few, torch.float32, True) and not shape.branch_pays(many, torch.float32, True)
    branched.clear()
    outputs = []
    for tokens in (few, many):
        x = torch.randn(1, layer.in_features).expand(tokens, -1)
        outputs.append(layer(x)[0])
        wanted = torch.nn.functional.linear(x[:1], layer.dense_weight(), layer.bias)[0]
        assert torch.allclose(outputs[-1], wanted, atol=1e-4)
    assert [shape.numel() // layer.in_features for shape in branched] == [few]


def test_clones_with_different_modes_side_by_side(sd3: Any, model: Any) -> None:
    """All have the same patches, so that ComfyUI sees no reason to load anything anew."""
    packed, _ = sd3
    patched = model.with_lora(packed, model.make_lora(packed.model, 1))
    clones = {mode: with_mode(patched, mode) for mode in EXACT} | {"none": patched}
    outputs = {}
    for _ in range(2):
        for mode, clone in clones.items():
            output = model.run(clone, load=True)
            assert torch.equal(output, outputs.setdefault(mode, output))
            for layer in layers_of(clone, model).values():
                branch = layer.weight_patches.branch
                assert (branch is None) == (mode in ("none", MERGE))
                assert branch is None or branch.automatic == (mode == "automatic")
    assert torch.equal(outputs["none"], outputs[MERGE])
    clones["none"].detach()
    load_nothing(clones[BRANCH])
    assert model.relative_error(model.run(clones[BRANCH]), outputs[MERGE]) < TOLERANCE


@pytest.mark.parametrize("mode", [MERGE, BRANCH])
def test_patches_of_parts_of_a_weight(mode: str, sd3: Any, model: Any) -> None:
    """Fused projections get a LoRA for query, key and value each; some models want a function on the change."""
    from comfy.weight_adapter.lora import LoRAAdapter

    packed, dense = sd3
    name, layer = next((n, m) for n, m in layers_of(packed, model).items() if n.endswith(".attn.qkv"))
    rows, columns = layer.weight.shape
    generator = torch.Generator().manual_seed(1)

    def adapter(out: int, inputs: int, rank: int) -> LoRAAdapter:
        up, down = (torch.randn(*s, generator=generator) * 0.3 for s in ((out, rank), (rank, inputs)))
        return LoRAAdapter(set(), (up, down, 2.0, None, None, None))

    key, third = f"{name}.weight", rows // 3
    parts = [
        {(key, (0, third, third)): adapter(third, columns, 4)},
        {(key, (1, 8, 16)): adapter(rows, 16, 3)},
        {key: adapter(rows, columns, 5)},
    ]
    outputs = {}
    for function in (None, lambda change: change * 0.5):
        more = parts if function is None else [*parts, {(key, None, function): adapter(rows, columns, 2)}]
        clones = [with_mode(packed, mode), dense.clone()]
        for clone in clones:
            for part in more:
                assert clone.add_patches(part, 0.6)
        found, wanted = (model.run(clone, load=True) for clone in clones)
        load_whole(clones[0])
        assert (layer.weight_patches.branch is not None) == (mode == BRANCH and function is None)
        assert model.relative_error(found, wanted) < TOLERANCE
        outputs[function] = wanted
    first, second = outputs.values()
    assert model.relative_error(first, second) > 1e-3


@pytest.mark.parametrize("what", ["hook", "wrapper", "factor"])
def test_what_else_changes_a_weight_is_merged(what: str, sd3: Any, model: Any) -> None:
    """Beside a side branch, and on top of weights that are kept merged."""
    import comfy.hooks

    packed, dense = sd3
    shapes = shapes_of(packed, model)
    outputs = []
    for base in (with_mode(packed, BRANCH), dense):
        patched = model.with_lora(base, model.make_lora(packed.model, 1))
        patched = adapted(patched, make_adapter("LoHa", {n: s for n, s in shapes.items() if ".mlp." in n}))
        if what == "factor":
            extra = {f"{name}.weight": ("diff", (torch.zeros(shape),)) for name, shape in shapes.items()}
            assert patched.add_patches(extra, 1.0, 0.5)
        if what == "wrapper":
            for name in shapes:
                patched.add_weight_wrapper(f"{name}.weight", lambda weight: weight * 1.5)
        if what == "hook":
            lora = model.make_lora(packed.model, 2)
            hooks = comfy.hooks.create_hook_lora(lora, 0.8, 0.0)
            patched.register_all_hook_patches(
                hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
            )
            load_whole(patched)
            patched.patch_hooks(hooks)
        outputs.append(model.run(patched, load=what != "hook"))
        patched.unpatch_hooks()
        release(patched)
    assert model.relative_error(*outputs) < TOLERANCE


def test_factors_follow_the_compute_dtype_of_the_clone(sd3: Any, model: Any) -> None:
    packed, _ = sd3
    patched = model.with_lora(with_mode(packed, BRANCH), model.make_lora(packed.model, 1))
    exact = model.run(patched, load=True)
    half = patched.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    load_whole(half)
    layers = layers_of(half, model).values()
    assert {layer.weight_patches.branch.up.dtype for layer in layers} == {torch.bfloat16}
    assert model.relative_error(model.run(half).float(), exact) < 0.05
    load_whole(patched)
    assert {layer.weight_patches.branch.up.dtype for layer in layers} == {torch.float32}
    assert torch.equal(model.run(patched), exact)


def test_a_weight_that_comfyui_hands_over_decoded(sd3: Any, model: Any) -> None:
    """Where another node has a function on the weight, or dynamic VRAM meets a layer on the CPU."""
    from snug.nodes.adapter.packed_module import set_compute_dtype

    packed, _ = sd3
    outputs = {}
    for mode in (MERGE, BRANCH):
        patched = model.with_lora(with_mode(packed, mode), model.make_lora(packed.model, 1))
        patched.set_model_compute_dtype(torch.bfloat16)
        set_compute_dtype(patched.model, torch.bfloat16)
        load_whole(patched)
        plain = model.run(patched).float()
        for layer in layers_of(patched, model).values():
            layer.weight_function = [lambda weight: weight * 1.0]
        outputs[mode] = model.run(patched).float()
        assert model.relative_error(outputs[mode], plain) < 0.02
        release(patched)
    assert model.relative_error(*outputs.values()) < 0.02


# ---- other kinds of adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", COSTLY)
def test_other_kinds(kind: str, cache: bool, sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.lora

    packed, dense = sd3
    tensors = make_adapter(kind, shapes_of(packed, model))
    before, wanted = model.run(dense, load=True), model.run(adapted(dense, tensors), load=True)
    assert model.relative_error(wanted, before) > 0.01
    patched = adapted(with_mode(packed, BRANCH, cache), tensors)
    for load in LOADS[: 3 if cache else 4]:  # what is kept merged is given back before anything is offloaded
        load(patched)
        assert model.relative_error(model.run(patched), wanted) < TOLERANCE, load.__name__
        release(patched)
    load_whole(patched)
    merges: list[str] = []
    calculate = comfy.lora.calculate_weight
    monkeypatch.setattr(
        comfy.lora, "calculate_weight", lambda p, w, key, **o: merges.append(key) or calculate(p, w, key, **o)
    )
    assert model.relative_error(model.run(patched), wanted) < TOLERANCE
    assert len(merges) == (0 if cache else len(patched.patches))


@pytest.mark.parametrize("order", [("LoRA", "DoRA"), ("DoRA", "LoRA"), ("OFT", "LoRA")])
def test_kinds_on_one_layer(order: tuple[str, str], sd3: Any, model: Any) -> None:
    """DoRA and OFT depend on the whole weight: what came before them must be in it."""
    packed, dense = sd3
    shapes = shapes_of(packed, model)
    tensors = [make_adapter(kind, shapes, seed) for seed, kind in enumerate(order)]
    wanted = model.run(adapted(dense, *tensors), load=True)
    for cache in (True, False):
        found = model.run(adapted(with_mode(packed, "automatic", cache), *tensors), load=True)
        assert model.relative_error(found, wanted) < TOLERANCE
    other_way = model.run(adapted(dense, *reversed(tensors)), load=True)
    assert model.relative_error(other_way, wanted) > 1e-3, "the order makes no difference"


def test_kept_weights_are_counted_and_given_back(
    sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management

    packed, _ = sd3
    tensors = make_adapter("LoHa", shapes_of(packed, model))
    patched = adapted(with_mode(packed, "automatic"), tensors)
    layers = [
        layer for name, layer in layers_of(packed, model).items() if f"{name}.weight" in patched.patches
    ]
    largest = max(4 * layer.weight.numel() for layer in layers)
    load_whole(adapted(with_mode(packed, "automatic", False), tensors))
    loaded = packed.loaded_size()
    output = model.run(patched, load=True)
    everything = sum(4 * layer.weight.numel() for layer in layers)
    assert patched.loaded_size() == loaded + everything
    for _ in range(2):  # asking for less than all of it frees it all, and core's own weights stay
        assert patched.partially_unload(patched.offload_device, 1) == everything
        assert patched.loaded_size() == loaded and not patched.model.model_lowvram
        assert torch.equal(model.run(patched), output)
        load_whole(patched)
        assert patched.loaded_size() == loaded + everything, "there is memory again"
    freed = patched.partially_unload(patched.offload_device, everything + 1)
    assert freed > everything and patched.loaded_size() == loaded + everything - freed
    assert torch.equal(model.run(patched), output)
    release(patched)
    assert patched.loaded_size() == 0
    assert [layer.weight_patches for layer in layers] == [None] * len(layers)

    room = everything // 2
    free = management.minimum_inference_memory() + room
    monkeypatch.setattr(management, "get_free_memory", lambda _, both=False: (free, free) if both else free)
    assert torch.equal(model.run(patched, load=True), output)
    kept = patched.loaded_size() - loaded
    assert room - largest < kept <= room
    free = 1
    release(patched)
    assert model.relative_error(model.run(patched, load=True), output) < TOLERANCE
    assert patched.loaded_size() == loaded


def test_another_nodes_function_on_a_weight_that_is_kept_merged(sd3: Any, model: Any) -> None:
    packed, _ = sd3
    loha = make_adapter("LoHa", shapes_of(packed, model))
    outputs = []
    for cache in (False, True):
        patched = adapted(with_mode(packed, MERGE, cache), loha)
        load_whole(patched)
        layers = layers_of(patched, model).values()
        assert (
            any(layer.weight_patches and layer.weight_patches.kept is not None for layer in layers) == cache
        )
        for layer in layers:
            layer.weight_function = [lambda weight: weight * 1.5]
        outputs.append(model.run(patched))
        release(patched)
    assert model.relative_error(*outputs) < TOLERANCE


def test_changed_patches_are_not_taken_from_the_cache(sd3: Any, model: Any) -> None:
    packed, dense = sd3
    tensors = make_adapter("LoKr", shapes_of(packed, model))
    chosen = with_mode(packed, "automatic")
    for strength in (0.7, 0.2):
        found, wanted = (
            model.run(adapted(base, tensors, strength=strength), load=True) for base in (chosen, dense)
        )
        assert model.relative_error(found, wanted) < TOLERANCE
    assert torch.equal(model.run(chosen, load=True), model.run(packed, load=True))


# ---- compiled --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_compiles_again(twins: Any, model: Any) -> None:
    packed, _ = twins("sd3", "Q8_0").load()
    lora, loha = model.make_lora(packed.model, 1), make_adapter("LoHa", shapes_of(packed, model))
    first = compiled(packed)
    load_whole(first)
    predict(first, "sd3")
    for mode in EXACT:
        for strength in (0.8, -0.3):
            for make in (lambda p, s=strength: model.with_lora(p, lora, s), lambda p: adapted(p, loha)):
                fast, slow = make(with_mode(first, mode)), make(with_mode(packed, MERGE, False))
                load_whole(fast)
                with compiles(0):
                    found = predict(fast, "sd3")
                load_whole(slow)
                assert model.relative_error(found, predict(slow, "sd3")) < TOLERANCE
