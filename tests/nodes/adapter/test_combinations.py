"""Features on one model, alone and in pairs: each result is what ComfyUI gives for the same weights, and is undone."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from combinations import (
    ALONE,
    CHANGING,
    FEATURES,
    ORDERED_PAIRS,
    PAIRS,
    Bench,
    error,
    sample,
    with_features,
    with_lora,
)
from compiled_models import predict
from memory_states import LOADS, load_whole
from narrow_models import accept_narrow_models
from simulated_transfers import Transfers, simulate_transfers

FORMATS = ["Q4_K", "nf4", "int8", "fp8-rows", "dense"]
# Scaled layers, and what the loader node casts. They stay as they are, but for the LoRA that is merged into them.
FORMATS_OF_CORE = ["fp8", "dense-float8"]
FAMILIES = [("flux", "Q4_K"), ("flux", "nf4"), ("sd15", "Q8_0"), ("sd15", "dense")]
TOLERANCE = 1e-5
# ComfyUI rounds a float8 weight to float8 again where it merges a LoRA, but not where it offloads the layer.
FLOAT8_TOLERANCE = 0.15
# Weights of four bits, or float8, rounded once more with the LoRA in them.
BAKING_TOLERANCE = 0.2


@pytest.fixture(autouse=True)
def as_in_a_workflow(comfy: Any) -> Iterator[None]:
    """ComfyUI runs every node, loading included, in inference mode."""
    with torch.inference_mode():
        yield
        comfy.model_management.unload_all_models()


@pytest.fixture(autouse=True)
def transfers(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    return simulate_transfers(monkeypatch)


@pytest.fixture(scope="module")
def bench(twins: Any, comfy: Any) -> Iterator[Callable[[str, str], Bench]]:
    """bench(family, format): its models, loaded once."""
    made: dict[tuple[str, str], Bench] = {}
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as monkeypatch:
        accept_narrow_models(monkeypatch)

        def make(family: str, format: str) -> Bench:
            if (family, format) not in made:
                made[family, format] = _bench(twins, family, format)
            return made[family, format]

        yield make
    torch._dynamo.reset()


def _bench(twins: Any, family: str, format: str) -> Bench:
    import comfy.sd
    from snug.nodes.adapter.loading import load_diffusion_model

    files = twins(family, "Q8_0" if format.startswith("dense") else format)

    def core() -> Any:
        return comfy.sd.load_diffusion_model(str(files.dense), model_options=options)

    def packed() -> Any:
        return load_diffusion_model(str(files.gguf))

    options = {"dtype": torch.float8_e4m3fn} if format == "dense-float8" else {}
    if format.startswith("dense"):
        return Bench(family, core, core)
    return Bench(family, packed, packed if format == "fp8" else core)


def check(models: Bench, features: Sequence[str], tolerance: float = TOLERANCE) -> None:
    """The chain of nodes, then the same without the last one, then without any."""
    shorter = with_features(models.plain, features[:-1])
    longer = with_features(shorter, features[-1:])
    assert error(sample(longer, models.family), models.expected(features)) < tolerance
    if features[1:]:
        assert error(sample(shorter, models.family), models.expected(features[:-1])) < tolerance
    models.check_undone()


@pytest.mark.parametrize("features", [*ALONE, *ORDERED_PAIRS], ids=" then ".join)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_plain_model(format: str, features: tuple[str, ...], bench: Any) -> None:
    check(bench("sd3", format), features)


@pytest.mark.parametrize("features", [*ALONE, *PAIRS], ids=" then ".join)
@pytest.mark.parametrize("format", FORMATS_OF_CORE)
def test_core_formats(format: str, features: tuple[str, ...], bench: Any) -> None:
    rounds_again = format == "dense-float8" and {"lora", "offload"} == set(features)
    check(bench("sd3", format), features, FLOAT8_TOLERANCE if rounds_again else TOLERANCE)


@pytest.mark.parametrize(("family", "format"), FAMILIES)
def test_all_features_together(family: str, format: str, bench: Any) -> None:
    check(bench(family, format), tuple(FEATURES))
    check(bench(family, format), tuple(reversed(FEATURES)))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("format", ["Q4_K", "dense"])
def test_all_features_in_every_state_of_memory(format: str, load: Callable[[Any], None], bench: Any) -> None:
    models = bench("sd3", format)
    reference, patcher = models.reference(FEATURES), with_features(models.plain, FEATURES)
    load_whole(reference)
    wanted = predict(reference, "sd3")
    load(patcher)
    assert error(predict(patcher, "sd3"), wanted) < TOLERANCE
    patcher.detach()
    models.check_undone()


@pytest.mark.parametrize("features", [*ALONE, tuple(FEATURES)], ids=" then ".join)
@pytest.mark.parametrize("format", ["nf4", "dense"])
def test_clones_with_different_settings(format: str, features: tuple[str, ...], bench: Any) -> None:
    """Each gives what it gives alone, bit for bit, whatever was sampled in between."""
    import comfy.model_management

    models = bench("sd3", format)
    clones = [models.plain, *(with_features(models.plain, features, setting) for setting in (0, 1))]
    alone = []
    for clone in clones:
        alone.append(sample(clone, "sd3"))
        comfy.model_management.unload_all_models()
    for setting in (0, 1):
        assert error(alone[1 + setting], models.expected(features, setting)) < TOLERANCE
    if set(features) & set(CHANGING):
        assert min(error(*pair) for pair in itertools.combinations(alone, 2)) > 1e-3
    for number in (1, 2, 1, 0, 2, 0, 1):
        assert torch.equal(sample(clones[number], "sd3"), alone[number])
    del clones, clone  # while one of them is loaded
    models.check_undone()


@pytest.mark.parametrize("format", ["Q4_K", "dense"])
@pytest.mark.parametrize("mode", ["side branch", "automatic", "bake in"])
def test_lora_modes_among_all_others(
    mode: str, format: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snug.nodes.adapter.lora_mode import set_lora_mode

    def apply(patcher: Any, strength: float) -> Any:
        return set_lora_mode(with_lora(patcher, strength), mode, True)[0]

    monkeypatch.setitem(FEATURES, "lora", FEATURES["lora"]._replace(apply=apply))
    tolerance = BAKING_TOLERANCE if mode == "bake in" else TOLERANCE
    for chain in (["casting", "offload", "compile", "lora"], ["lora", "compile", "offload", "casting"]):
        check(bench("sd3", format), chain, tolerance)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_after_all_others(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ({"backend": "inductor"}, {})
    monkeypatch.setitem(FEATURES, "compile", FEATURES["compile"]._replace(settings=settings))
    check(bench("sd3", "Q4_K"), [*(name for name in FEATURES if name != "compile"), "compile"])
