"""Precision of a MODEL: every setting calculates what it says, equals the plain model and is gone without the node."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from compiled_models import compiled, compiles, load_part, predict
from memory_states import load_whole
from narrow_models import accept_narrow_models
from torch.overrides import TorchFunctionMode

# Largest relative difference from the model in float32: what a dtype's rounding makes of a whole tiny model.
ROUNDING = {"fp32": 1e-5, "fp16": 6e-3, "bf16": 4e-2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def load(twins: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """load(family, format): a tiny model; "dense" is float32 and "dense-…" 16-bit, by ComfyUI's own loader."""

    def load(family: str, format: str) -> Any:
        import comfy.sd

        if family == "flux":
            accept_narrow_models(monkeypatch)
        kind, _, dtype = format.partition("-")
        if kind != "dense":
            return twins(family, format).load()[0]
        options = {"dtype": DTYPES[dtype]} if dtype else {}
        return comfy.sd.load_diffusion_model(str(twins(family, "Q8_0").dense), model_options=options)

    return load


def precise(patcher: Any, **settings: Any) -> Any:
    from snug.nodes.adapter.precision import PrecisionSettings, set_precision

    return set_precision(patcher, PrecisionSettings(**settings))[0]


def run(patcher: Any, family: str, **options: Any) -> torch.Tensor:
    load_whole(patcher)
    return predict(patcher, family, **options).float()


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


class Recorder(TorchFunctionMode):
    """calls: (name, dtype of the first argument, shape of the second) of torch's functions called `names`."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.calls: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.names:
            self.calls.append((name, args[0].dtype, tuple(getattr(args[1], "shape", ()))))
        return func(*args, **(kwargs or {}))


# ---- compute dtype and islands ---------------------------------------------------------------------------------

FORMATS = ["Q4_0", "nf4", "int8", "fp8", "dense", "dense-fp16", "dense-bf16"]
MODELS = [
    *(("sd3", format) for format in FORMATS),
    *((family, format) for family in ("sd15", "flux", "wan") for format in ("Q8_0", "dense-bf16")),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "format"), MODELS)
def test_compute_dtype(family: str, format: str, dtype: str, load: Any) -> None:
    plain = load(family, format)
    before = run(plain, family)
    reference = run(precise(plain, compute_dtype="fp32"), family)
    limit = ROUNDING[dtype] * (8 if family == "flux" else 1)  # whose random weights spread every error
    inputs: list[torch.dtype] = []
    layer = next(m for _, m in plain.model.diffusion_model.named_modules() if hasattr(m, "out_features"))
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    for islands in (False, True):
        inputs.clear()
        found = run(precise(plain, compute_dtype=dtype, fp32_islands=islands), family)
        assert set(inputs) == {DTYPES[dtype]}
        assert error(found, reference) < limit
        if dtype != "fp32":
            assert error(found, reference) > limit / 1000, "nothing was rounded"
    hook.remove()
    assert torch.equal(run(plain, family), before), "the given model has changed"


@pytest.mark.parametrize("format", ["Q4_0", "nf4"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_lora_is_added_before_rounding(format: str, dtype: str, load: Any, model: Any) -> None:
    """The shared weights say float32; the clone's are decoded and patched in float32 and rounded once."""
    plain = load("sd3", format)
    patched = precise(model.with_lora(plain, model.make_lora(plain.model, 1)), compute_dtype=dtype)
    load_whole(patched)
    name, layer = next(model.packed_modules(plain.model))
    with Recorder("linear") as recorder:
        predict(patched, "sd3")
    assert recorder.calls and {call[1] for call in recorder.calls} >= {DTYPES[dtype]}
    weights = []
    x = torch.eye(layer.weight.shape[1], dtype=DTYPES[dtype])
    found = layer(x).float() - (0 if layer.bias is None else layer.bias.float())
    weights.append(layer.dense_weight(dtype=torch.float32).to(DTYPES[dtype]).float())
    if layer.bias is None:
        assert torch.equal(found.T, weights[0])
    assert (found.T - weights[0]).abs().max() < 0.02


@pytest.mark.parametrize(("family", "format"), [("sd3", "Q4_0"), ("sd15", "dense-fp16"), ("wan", "dense")])
def test_islands_calculate_in_float32(family: str, format: str, load: Any) -> None:
    norms = ("layer_norm", "group_norm", "rms_norm")
    plain = load(family, format)
    network = plain.model.diffusion_model
    final = {"sd3": "final_layer.linear", "sd15": "out.2", "wan": "head.head"}[family]
    shape = tuple(network.get_submodule(final).weight.shape)
    for islands, wanted in ((True, torch.float32), (False, torch.float16)):
        patcher = precise(plain, compute_dtype="fp16", fp32_islands=islands)
        load_whole(patcher)
        with Recorder(*norms, "linear", "conv2d") as recorder:
            predict(patcher, family)
        assert {dtype for name, dtype, _ in recorder.calls if name in norms} == {wanted}
        others = [call for call in recorder.calls if call[0] not in norms]
        assert {dtype for _, dtype, weight in others if weight == shape} == {wanted}
        assert torch.float16 in {dtype for *_, dtype, _ in others}
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_a_model_built_for_its_16_bit_weights(load: Any, twins: Any) -> None:
    """As ComfyUI builds models where the device calculates in the weights' dtype: layers that cast nothing."""
    import comfy.ops
    import comfy.sd

    options = {"dtype": torch.bfloat16, "custom_operations": comfy.ops.disable_weight_init}
    plain = comfy.sd.load_diffusion_model(str(twins("sd3", "Q8_0").dense), model_options=options)
    plain.model.manual_cast_dtype = None
    reference = run(load("sd3", "dense"), "sd3")
    for patcher, norms, layers in (
        (plain, torch.bfloat16, torch.bfloat16),
        (precise(plain), torch.float32, torch.bfloat16),
        (precise(plain, fp32_islands=False), torch.bfloat16, torch.bfloat16),
        (precise(plain, compute_dtype="fp32"), torch.float32, torch.float32),
        (precise(precise(plain, compute_dtype="fp32"), compute_dtype="fp16"), torch.float32, torch.float16),
        (precise(precise(plain, compute_dtype="fp16"), fp32_islands=False), torch.float16, torch.float16),
        (plain, torch.bfloat16, torch.bfloat16),
    ):
        load_whole(patcher)
        with Recorder("layer_norm", "linear") as recorder:
            found = predict(patcher, "sd3")
        assert error(found, reference) < ROUNDING["bf16"]
        assert {dtype for name, dtype, _ in recorder.calls if name == "layer_norm"} == {norms}
        assert layers in {dtype for name, dtype, _ in recorder.calls if name == "linear"}


@pytest.mark.parametrize("format", ["Q4_0", "dense", "dense-bf16"])
def test_clones_side_by_side(format: str, load: Any, model: Any) -> None:
    plain = load("sd3", format)
    lora = model.make_lora(load("sd3", "Q4_0").model, 1)
    runs = [
        plain,
        precise(plain, compute_dtype="bf16"),
        precise(plain, compute_dtype="fp32"),
        model.with_lora(precise(plain, compute_dtype="fp16", attention_slicing="4"), lora),
        precise(model.with_lora(plain, lora), compute_dtype="fp16", attention_slicing="4"),
    ]
    outputs = [run(patcher, "sd3") for patcher in runs]
    assert torch.equal(outputs[3], outputs[4]), "the order of LoRA and precision matters"
    assert len({output.sum().item() for output in outputs}) >= 3
    for _ in range(2):
        for patcher, output in zip(runs, outputs, strict=True):
            assert torch.equal(run(patcher, "sd3"), output)


@pytest.mark.parametrize("part", [0, 0.5])
@pytest.mark.parametrize("format", ["Q4_0", "dense"])
def test_offloaded(format: str, part: float, load: Any, model: Any) -> None:
    plain = load("sd3", format)
    lora = model.make_lora(load("sd3", "Q4_0").model, 1)
    patcher = precise(model.with_lora(plain, lora), compute_dtype="fp16", fuse_qkv=True)
    wanted = run(patcher, "sd3")
    load_part(patcher, max(1, int(part * patcher.model_size())))
    assert error(predict(patcher, "sd3").float(), wanted) < ROUNDING["fp16"]


def test_weights_cast_by_another_node(load: Any) -> None:
    """Layerwise casting copies the model; the settings go with it."""
    from snug.nodes.adapter.layerwise_casting import cast_model

    plain = load("sd15", "Q8_0")
    casting = cast_model(load("sd15", "dense"), "float8_e4m3fn per row", "auto", "default")[0]
    for source in (plain, casting):
        settings = precise(source, compute_dtype="fp16", fuse_qkv=True)
        copied = cast_model(settings, "float8_e4m3fn per row", "auto", "")[0]
        with Recorder("layer_norm") as recorder:
            found = run(copied, "sd15")
        assert {dtype for _, dtype, _ in recorder.calls} == {torch.float32}
        assert error(found, run(source, "sd15")) < 0.2


# ---- attention -------------------------------------------------------------------------------------------------


@pytest.fixture
def called(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(name, queries) of each call of ComfyUI's attention functions that is let through."""
    from comfy.ldm.modules import attention

    calls: list[tuple[str, int]] = []

    def recording(name: str, function: Any) -> Any:
        def record(q: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, q.shape[2 if kwargs.get("skip_reshape") else 1]))
            return function(q, *args, **kwargs)

        return record

    for name, function in attention.REGISTERED_ATTENTION_FUNCTIONS.items():
        monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, name, recording(name, function))
    return calls


@pytest.mark.parametrize("family", ["sd3", "sd15", "flux", "wan"])
def test_backends_are_called(family: str, load: Any, called: list[tuple[str, int]]) -> None:
    from snug.nodes.adapter.attention import attention_backends

    plain = load(family, "Q8_0")
    before = run(plain, family)
    names = attention_backends()[1:]
    assert {"pytorch", "split", "sub_quad"} <= set(names)
    for name in ("pytorch", "split", "sub_quad"):
        called.clear()
        found = run(precise(plain, attention_backend=name), family)
        assert {call[0] for call in called} == {name}
        assert error(found, before) < 1e-5
    called.clear()
    assert torch.equal(run(plain, family), before)
    assert torch.equal(run(precise(plain), family), before)
    assert called == []


@pytest.mark.parametrize("slices", ["2", "8", "32"])
@pytest.mark.parametrize("family", ["sd3", "sd15", "flux", "wan"])
def test_slices(family: str, slices: str, load: Any, called: list[tuple[str, int]]) -> None:
    plain = load(family, "Q8_0")
    whole = run(precise(plain, attention_backend="pytorch"), family)
    tokens, count = max(tokens for _, tokens in called), len(called)
    called.clear()
    sliced = precise(plain, attention_backend="pytorch", attention_slicing=slices)
    assert error(run(sliced, family), whole) < 1e-5
    assert max(queries for _, queries in called) == -(-tokens // int(slices))
    assert len(called) > count
    assert error(run(precise(plain, attention_slicing=slices), family), whole) < 1e-5


def test_automatic_slices_are_those_of_core(load: Any, called: list[tuple[str, int]]) -> None:
    run(precise(load("sd3", "Q4_0"), attention_slicing="auto"), "sd3")
    assert {name for name, _ in called} == {"split"}


@pytest.mark.parametrize("shape", [(40, 24), (2, 40, 24), (2, 1, 40, 24), (2, 4, 40, 24), (2, 1, 1, 24)])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_slices_of_masks(
    shape: tuple[int, ...], skip_reshape: bool, skip_output_reshape: bool, comfy: Any
) -> None:
    from comfy.ldm.modules.attention import attention_pytorch
    from snug.nodes.adapter.attention import AttentionChoice

    q, k, v = torch.randn(2, 4, 40, 8), torch.randn(2, 4, 24, 8), torch.randn(2, 4, 24, 8)
    if not skip_reshape:
        q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    options = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    for mask in (torch.randn(shape), torch.rand(shape) > 0.5):
        if mask.dtype == torch.bool:
            mask[..., 0] = True
        whole = attention_pytorch(q, k, v, 4, mask=mask, **options)
        for slices in (1, 3, 64):
            found = AttentionChoice("pytorch", slices)(attention_pytorch, q, k, v, 4, mask=mask, **options)
            assert torch.allclose(found, whole, atol=1e-6)


def test_what_another_node_has_set_is_sliced(load: Any) -> None:
    def override(function: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        queries.append(q.shape[1])
        return function(q, *args, **kwargs)

    queries: list[int] = []
    plain = load("sd3", "Q4_0").clone()
    plain.model_options["transformer_options"]["optimized_attention_override"] = override
    wanted = run(plain, "sd3")
    assert error(run(precise(plain), "sd3"), wanted) == 0
    whole = max(queries)
    queries.clear()
    assert error(run(precise(plain, attention_slicing="4"), "sd3"), wanted) < 1e-5
    assert max(queries) == -(-whole // 4)


def test_a_second_node_keeps_what_it_does_not_set(load: Any, called: list[tuple[str, int]]) -> None:
    plain = load("sd3", "Q4_0")
    run(precise(plain, attention_backend="pytorch"), "sd3")
    tokens = max(tokens for _, tokens in called)

    def calls(first: dict[str, str], second: dict[str, str]) -> tuple[set[str], int]:
        called.clear()
        run(precise(precise(plain, **first), **second), "sd3")
        return {name for name, _ in called}, -(-tokens // max(queries for _, queries in called))

    slices, backend = {"attention_slicing": "4"}, {"attention_backend": "sub_quad"}
    assert calls(slices, backend) == calls(backend, slices) == ({"sub_quad"}, 4)
    assert calls({**backend, **slices}, {"attention_slicing": "2"}) == ({"sub_quad"}, 2)
    assert calls({**backend, **slices}, {"attention_slicing": "auto"}) == ({"split"}, 1)


def test_what_cannot_be_is_said(load: Any) -> None:
    from snug.quant_backends.core.errors import SnugError

    plain = load("sd3", "Q4_0")
    with pytest.raises(
        SnugError, match=r"'sage' is not available in this ComfyUI \(it needs .*sageattention"
    ):
        precise(plain, attention_backend="sage")
    with pytest.raises(SnugError, match="slicing 'auto' is done by the backend 'split'"):
        precise(plain, attention_backend="pytorch", attention_slicing="auto")


# ---- fused projections -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["Q8_0", "nf4", "int8", "fp8"])
@pytest.mark.parametrize(("family", "widths"), [("sd15", {960, 640}), ("wan", {768, 512})])
def test_fused_projections(family: str, widths: set[int], format: str, load: Any, model: Any) -> None:
    plain = load(family, format)
    fused = precise(plain, fuse_qkv=True)
    loras = [model.make_lora(plain.model, seed) for seed in (1, 2)]
    for patches in ([], [(0, 0.8)], [(0, 0.8), (1, -0.4)], [(1, 0.5)], []):
        outputs = []
        for current in (plain, fused):
            for number, strength in patches:
                current = model.with_lora(current, loras[number], strength)
            load_whole(current)
            with Recorder("linear") as recorder:
                outputs.append(predict(current, family))
            rows = [weight[0] for _, _, weight in recorder.calls]
            joint = [count for count in rows if count in widths]
        assert set(joint) == widths, "nothing was fused"
        assert error(*outputs) < 1e-5


def group_of(patcher: Any) -> Any:
    from snug.nodes.adapter.fused_projections import find_projections

    return next(group for group in find_projections(patcher.model) if len(group.layers) == 3)


def alone(group: Any, x: torch.Tensor) -> list[torch.Tensor]:
    return [type(layer).forward(layer, x) for layer in group.layers]


def check(group: Any, inputs: list[tuple[int, torch.Tensor]]) -> None:
    for index, x in inputs:
        assert torch.allclose(group.forward(index, x), alone(group, x)[index], atol=1e-5)


def test_results_belong_to_their_input(load: Any) -> None:
    plain = load("sd15", "Q8_0")
    load_whole(plain)
    x, other = torch.randn(2, 9, 320), torch.randn(2, 9, 320)
    for inputs in (
        [(0, x), (1, x), (2, x), (0, other), (2, other), (1, other)],
        [(0, x), (1, other), (2, other), (0, x)],
        [(0, x), (0, other), (1, other), (2, other)],
        [(0, x), (1, x.clone()), (2, x)],
        [(1, x), (0, other), (2, x), (1, x)],
    ):
        check(group_of(plain), inputs)


def test_an_input_that_is_written_to(load: Any) -> None:
    plain = load("sd15", "Q8_0")
    load_whole(plain)
    group = group_of(plain)
    x = torch.randn(2, 9, 320)
    with torch.inference_mode():
        check(group, [(0, x)])
        x += 1
        check(group, [(1, x), (2, x)])
        assert not group.trusted


def test_nothing_is_kept(load: Any) -> None:
    plain = load("sd15", "Q8_0")
    load_whole(plain)
    group = group_of(plain)
    for calls in (range(3), range(2)):
        x = torch.randn(2, 9, 320)
        freed = weakref.ref(x)
        for index in calls:
            group.forward(index, x)
        if len(calls) < 3:
            assert freed() is x
            group.forget()
        del x
        assert freed() is None


def test_interrupted_and_called_again(load: Any) -> None:
    plain = load("sd15", "Q8_0")
    fused = precise(plain, fuse_qkv=True)
    wanted = run(plain, "sd15")
    group = next(
        iter(next(iter(fused.wrappers["apply_model"]["snug_precision"]))._parts.values())
    ).projections[0]

    def interrupt(*_: Any) -> None:
        raise RuntimeError("cancelled")

    for _ in range(2):
        hook = group.layers[1].register_forward_pre_hook(interrupt)
        load_whole(fused)
        with pytest.raises(RuntimeError, match="cancelled"):
            predict(fused, "sd15")
        hook.remove()
        assert not group._waiting.__dict__
        assert not any("forward" in module.__dict__ for module in plain.model.modules())
        assert error(run(fused, "sd15", seed=7), wanted) < 1e-5
        assert group.trusted


def test_threads(load: Any) -> None:
    plain = load("sd15", "Q8_0")
    load_whole(plain)
    group = group_of(plain)
    inputs = [torch.randn(1, 9, 320) for _ in range(4)]
    wanted = [alone(group, x) for x in inputs]

    def work(number: int) -> bool:
        torch.set_grad_enabled(False)
        found = [[group.forward(index, inputs[number]) for index in range(3)] for _ in range(10)]
        return all(
            torch.allclose(a, b, atol=1e-5) for one in found for a, b in zip(one, wanted[number], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


# ---- with torch.compile ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("first", ["compile", "precision"])
@pytest.mark.parametrize(("family", "format"), [("sd3", "Q4_0"), ("sd15", "Q8_0"), ("flux", "dense-bf16")])
def test_compiled(family: str, format: str, first: str, load: Any, model: Any) -> None:
    settings = {"compute_dtype": "bf16", "fuse_qkv": True, "attention_slicing": "4"}
    plain = load(family, format)
    eager = precise(plain, **settings)
    patcher = precise(compiled(plain), **settings) if first == "compile" else compiled(eager)
    wanted = run(eager, family)
    load_whole(patcher)
    with compiles(2):
        assert error(predict(patcher, family).float(), wanted) < ROUNDING["bf16"]
    lora = model.make_lora(load(family, "Q8_0").model, 1)
    outputs = []
    for current in (eager, patcher):
        patched = model.with_lora(current, lora)
        load_whole(patched)
        with compiles(0):
            outputs.append(predict(patched, family, seed=11).float())
    assert error(*outputs) < ROUNDING["bf16"] * (8 if family == "flux" else 1)
    assert not any("forward" in module.__dict__ for module in plain.model.modules())
