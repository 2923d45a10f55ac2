"""SnugTorchCompile: compiled models equal eager ones, and what a user changes between runs does not compile again."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_models import compiled, compiles, fresh_compiler, load_part, predict  # noqa: F401
from memory_states import load_whole
from narrow_models import accept_narrow_models

FORMATS = ["Q4_0", "Q4_K", "nf4", "int8", "fp8", "quanto-int4", "torchao-int8", "dense"]
TOLERANCE = 1e-5
# The last block of SD3 has no second half, so that there are two kinds, which need code of their own.
KINDS_OF_SD3 = 2


@pytest.fixture
def load(twins: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """load(family, format): a tiny model; "dense" is plain float32 from ComfyUI's own loader."""

    def load(family: str, format: str) -> Any:
        if family == "flux":
            accept_narrow_models(monkeypatch)
        packed, dense = twins(family, "Q4_0" if format == "dense" else format).load()
        return dense if format == "dense" else packed

    return load


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_lora_and_memory_compile_nothing(format: str, load: Any, model: Any) -> None:
    """Every state is compared with the same state uncompiled; fullgraph, so that no part can have escaped."""
    plain = load("sd3", format)
    patcher = compiled(plain)
    load_whole(patcher)
    with compiles(KINDS_OF_SD3):
        first = predict(patcher, "sd3")
    assert torch.allclose(first, predict(plain, "sd3"), atol=TOLERANCE)

    some, half = 1, plain.model_size() // 2
    lora, other = (model.make_lora(load("sd3", "Q4_0").model, seed) for seed in (1, 2))
    for loras, budget in [
        ([], some),
        ([], half),
        ([(lora, 0.8)], None),
        ([(lora, -0.3)], half),
        ([(lora, 0.8), (other, 0.5)], some),
        ([(lora, 0.8), (other, 0.5)], None),
        ([(other, 1.0)], half),
    ]:
        outputs = []
        for current in (patcher, plain):
            for weights, strength in loras:
                current = model.with_lora(current, weights, strength)
            load_whole(current) if budget is None else load_part(current, budget)
            with compiles(0):
                outputs.append(predict(current, "sd3", seed=11))
        assert torch.allclose(*outputs, atol=TOLERANCE), (len(loras), budget)
    load_whole(patcher)
    assert torch.equal(predict(patcher, "sd3"), first), "removing the LoRA must restore the output exactly"


FAMILIES = [("flux", "Q4_K"), ("flux", "nf4"), ("flux", "dense"), ("sd15", "Q8_0"), ("sd15", "dense")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "format", "scope"),
    [
        *((*family, "regional (repeated blocks)") for family in FAMILIES),
        ("flux", "Q4_K", "whole model"),
        ("sd15", "Q8_0", "whole model"),
    ],
)
def test_families(family: str, format: str, scope: str, load: Any) -> None:
    """Flux: attention over two streams in one. SD1.5: convolutions, and norms with weights."""
    plain = load(family, format)
    patcher = compiled(plain, scope=scope)
    load_whole(patcher)
    with compiles(1):
        fast = predict(patcher, family)
    load_whole(plain)
    assert torch.allclose(fast, predict(plain, family), atol=TOLERANCE)
    with compiles(0):
        load_part(patcher, patcher.model_size() // 2)
        assert torch.allclose(predict(patcher, family), fast, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor(load: Any, model: Any) -> None:
    plain = load("sd3", "Q4_0")
    patcher = compiled(plain, backend="inductor")
    lora = model.make_lora(plain.model, 1)
    outputs = {}
    for name, base in {"fast": patcher, "slow": plain}.items():
        for strength in (None, 0.8, 0.4):
            current = base if strength is None else model.with_lora(base, lora, strength)
            load_whole(current)
            with compiles(KINDS_OF_SD3 if name == "fast" and strength is None else 0):
                outputs[name, strength] = predict(current, "sd3")
    for strength in (None, 0.8, 0.4):
        assert torch.allclose(outputs["fast", strength], outputs["slow", strength], atol=TOLERANCE)


def test_the_sampler_compiles_once(sd3: Any) -> None:
    """Through ComfyUI's own sampling: steps, seeds and a node that is run again compile nothing."""
    import comfy.sample

    def sample(patcher: Any, seed: int, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        texts = [
            [[torch.randn(1, 77, 4096, generator=generator), {"pooled_output": torch.zeros(1, 2048)}]]
            for _ in range(2)
        ]
        noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
        return comfy.sample.sample(
            patcher,
            noise,
            steps,
            4.0,
            "euler",
            "simple",
            *texts,
            torch.zeros(1, 16, 8, 8),
            disable_pbar=True,
            seed=seed,
        )

    plain, _ = sd3
    wanted = sample(plain, 0, 2)
    with compiles(KINDS_OF_SD3):
        assert torch.allclose(sample(compiled(plain), 0, 2), wanted, atol=TOLERANCE)
    with compiles(0):
        sample(compiled(plain), 3, 4)


@pytest.mark.parametrize("format", ["Q4_0", "dense"])
def test_loading_again_compiles_nothing(format: str, load: Any) -> None:
    """Nor does compiled code keep the first model, whose weights it has seen, in memory."""
    import comfy.model_management

    outputs, models = [], []
    for at_most in (KINDS_OF_SD3, 0):
        patcher = compiled(load("sd3", format))
        load_whole(patcher)
        with compiles(at_most):
            outputs.append(predict(patcher, "sd3"))
        models.append(weakref.ref(patcher.model))
        comfy.model_management.unload_all_models()
        del patcher
    gc.collect()
    assert torch.equal(*outputs)
    assert [model() for model in models] == [None, None]


def test_two_settings_side_by_side(sd3: Any, model: Any) -> None:
    plain, _ = sd3
    regional = compiled(plain, backend="eager")
    whole = compiled(regional, scope="whole model", fullgraph=False)
    lora = model.with_lora(whole, model.make_lora(plain.model, 1))
    outputs = []
    for patcher in (plain, regional, whole, plain, lora, whole):
        load_whole(patcher)
        outputs.append(predict(patcher, "sd3"))
    assert not torch.allclose(outputs.pop(4), outputs[0], atol=0.05)
    assert all(torch.allclose(output, outputs[0], atol=TOLERANCE) for output in outputs)


def test_the_model_is_as_before(sd3: Any) -> None:
    """No setting of torch, no module and no wrapper of the original is changed, not even when a step fails."""
    import torch._inductor.config

    plain, _ = sd3
    load_whole(plain)
    network = plain.model.diffusion_model
    wanted = predict(plain, "sd3")
    before = [state_of(network), settings_of(torch._dynamo.config), settings_of(torch._inductor.config)]
    patcher = compiled(plain)
    predict(patcher, "sd3")
    with pytest.raises(Exception, match="shape|size"):
        predict(patcher, "flux")
    assert [
        state_of(network),
        settings_of(torch._dynamo.config),
        settings_of(torch._inductor.config),
    ] == before
    with compiles(0):
        assert torch.equal(predict(plain, "sd3"), wanted)
    assert not any(plain.wrappers.get("apply_model", {}).values())


def settings_of(config: Any) -> dict[str, Any]:
    return {name: repr(value) for name, value in config.get_config_copy().items()}


def state_of(network: torch.nn.Module) -> list[Any]:
    return [(name, type(module), sorted(vars(module))) for name, module in network.named_modules()]


def test_bypass_lora(sd3: Any, model: Any) -> None:
    """A node that replaces the forward of layers keeps its effect, and may come and go without compiling."""
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRA")
    plain, _ = sd3
    patcher = compiled(plain)
    load_whole(patcher)
    before = predict(patcher, "sd3")
    lora = model.make_lora(plain.model, 5)
    changed = []
    for base in (patcher, plain):
        bypass, _ = comfy.sd.load_bypass_lora_for_models(base, None, dict(lora), 0.8, 0)
        load_whole(bypass)
        with compiles(0):
            changed.append(predict(bypass, "sd3"))
    assert not torch.allclose(changed[0], before, atol=0.05)
    assert torch.allclose(*changed, atol=TOLERANCE)


@pytest.mark.slow
def test_patches_of_other_nodes_are_compiled_in(sd3: Any) -> None:
    """A patch that appears, changes or disappears must never meet code that was compiled for another."""
    plain, _ = sd3
    outputs = []
    for base in (plain, compiled(plain, fullgraph=False)):  # what attention does on a CPU breaks graphs
        for factor in (None, 0.5, 0.25, None):
            patcher = base.clone()
            if factor is not None:

                def attention(
                    function: Any, q: Any, k: Any, v: Any, *args: Any, _factor: float = factor, **options: Any
                ) -> Any:
                    return function(q, k, v * _factor, *args, **options)

                patcher.model_options["transformer_options"]["optimized_attention_override"] = attention
            load_whole(patcher)
            outputs.append(predict(patcher, "sd3"))
    for slow, fast in zip(outputs[:4], outputs[4:], strict=True):
        assert torch.allclose(slow, fast, atol=TOLERANCE)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
