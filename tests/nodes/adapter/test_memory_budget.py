"""A memory budget on a simulated GPU with more memory than that: ComfyUI's own management must stay within it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_budgets import GIGABYTE, LEAST_FREE, RESERVE, apply, roomy_gpu
from safetensors.torch import save_file
from simulated_gpu import SimulatedGPU
from small_text_encoders import PROMPT, SmallCLIP, load_dense
from snug.quant_backends.core.errors import SnugError
from twins import Twins


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGPU:
    return roomy_gpu(monkeypatch)


def load(*patchers: Any) -> None:
    import comfy.model_management

    comfy.model_management.load_models_gpu(list(patchers))


def computing(patcher: Any, size: int = 8) -> int:
    """Bytes with two images of that size in the latent, and what the simulated GPU keeps in reserve."""
    needed = patcher.model.memory_required([2, patcher.model.latent_format.latent_channels, size, size])
    return int(max(needed, LEAST_FREE)) + RESERVE


def test_everything_stays_in_a_large_budget(sd3: Any, gpu: SimulatedGPU, model: Any) -> None:
    gpu.holds(*sd3)
    for patcher in sd3:
        wanted = model.run(patcher, load=True)
        models, report = apply(GIGABYTE, patcher)
        assert "streamed" not in report and "stays on the GPU" in report
        assert models.model is not patcher and models.model.model is patcher.model
        assert torch.equal(model.run(models.model, load=True), wanted)
        assert models.model.loaded_size() == patcher.model_size()


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_model_is_streamed_within_a_small_one(
    sd3: Any, gpu: SimulatedGPU, model: Any, share: float
) -> None:
    gpu.holds(*sd3)
    for patcher in sd3:
        wanted = model.run(patcher, load=True)
        weights = int(share * patcher.model_size())
        models, report = apply(weights + computing(patcher), patcher)
        assert "streamed" in report and "A budget of" in report
        assert torch.equal(model.run(models.model, load=True), wanted)
        assert 0.5 * weights < gpu.used <= weights, report
        assert torch.equal(model.run(patcher, load=True), wanted)
        assert patcher.loaded_size() == patcher.model_size(), "the given model is as it was"
        patcher.detach()


def test_two_budgets_side_by_side(sd3: Any, gpu: SimulatedGPU, model: Any) -> None:
    packed, dense = sd3
    gpu.holds(packed, dense)
    wanted = model.run(dense, load=True)
    budgets = [int(share * dense.model_size()) for share in (0.5, 0.8)]
    runs = [apply(weights + computing(dense), dense)[0].model for weights in budgets]
    for _ in range(2):
        for weights, patcher in zip(budgets, runs, strict=True):
            assert torch.equal(model.run(patcher, load=True), wanted)
            assert gpu.used <= weights
            assert torch.equal(model.run(patcher.clone(), load=True), wanted)
            assert gpu.used <= weights
        assert torch.equal(model.run(dense, load=True), wanted)
        assert gpu.used == dense.model_size()


def test_unused_models_make_way(sd3: Any, sd15: Any, gpu: SimulatedGPU, model: Any) -> None:
    (_, used), (_, other) = sd3, sd15
    gpu.holds(used, other)
    budget = used.model_size() + computing(used) + other.model_size() // 3
    budgeted = apply(budget, used)[0].model
    for loaded_before in (False, True):
        load(other)
        assert gpu.used >= other.model_size()
        load(budgeted)
        assert budgeted.loaded_size() == used.model_size()
        assert 0 < other.loaded_size() <= other.model_size() // 3, loaded_before
        assert gpu.used <= budget - computing(used)
    load(other)
    load(used)
    assert gpu.used == used.model_size() + other.model_size(), "without the budget both stay"
    roomy = apply(budget + other.model_size(), used)[0].model
    load(roomy)
    assert other.loaded_size() == other.model_size(), "there is room for both"


def test_models_that_are_used_together_stay(sd3: Any, sd15: Any, gpu: SimulatedGPU) -> None:
    (unused, used), (_, other) = sd3, sd15
    gpu.holds(unused, used, other)
    budgeted = apply(used.model_size() + computing(used), used)[0].model
    for models in ([budgeted, other], [other, budgeted]):
        for patcher in (unused, other):
            load(patcher)
        load(*models)
        assert budgeted.loaded_size() == used.model_size()
        assert other.loaded_size() == other.model_size()
        load(budgeted)
        assert other.loaded_size() == unused.loaded_size() == 0


def test_lora_takes_of_the_budget(sd3: Any, gpu: SimulatedGPU, model: Any) -> None:
    packed, _ = sd3
    gpu.holds(packed)
    lora = model.make_lora(packed.model, 1)
    nbytes = sum(tensor.nbytes for tensor in lora.values())
    budget = packed.model_size() + computing(packed) + nbytes
    assert "streamed" not in apply(budget, model.with_lora(packed, lora))[1]
    report = apply(budget - nbytes // 2, model.with_lora(packed, lora))[1]
    assert "LoRA  " in report and "streamed" in report


def test_no_weights_are_kept_decoded(sd3: Any, gpu: SimulatedGPU) -> None:
    from snug.nodes.adapter.lora_settings import BRANCH, LoraSettings, lora_settings, set_lora_settings

    packed, _ = sd3
    gpu.holds(packed)
    source = packed.clone()
    set_lora_settings(source, LoraSettings(BRANCH, cache=True))
    budgeted = apply(GIGABYTE, source)[0].model
    assert lora_settings(budgeted) == LoraSettings(BRANCH, cache=False)
    assert lora_settings(source).cache


def test_clones_and_copies_keep_to_it(sd3: Any, sd15: Any, gpu: SimulatedGPU, model: Any) -> None:
    from snug.nodes.adapter.layerwise_casting import cast_model

    (packed, dense), (_, other) = sd3, sd15
    gpu.holds(dense, packed, other)
    budgeted = apply(dense.model_size() + computing(dense), dense)[0].model
    lora = model.make_lora(packed.model, 1)
    cast, _ = cast_model(budgeted, "float8_e4m3fn", "auto", "default")
    gpu.holds(cast)
    for patcher in (budgeted.clone(), model.with_lora(budgeted, lora), cast):
        load(other)
        load(patcher)
        assert patcher.loaded_size() == patcher.model_size()
        assert other.loaded_size() == 0


def test_text_encoders(
    comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd3: Any, gpu: SimulatedGPU
) -> None:
    save_file(SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json"), tmp_path / "clip.safetensors")
    clip = load_dense(comfy, tmp_path / "clip.safetensors", "stable_diffusion")
    gpu.holds(sd3[0], clip.patcher)

    def encode(clip: Any) -> torch.Tensor:
        return clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)[0]

    wanted = encode(clip)
    size = clip.patcher.model_size()
    weights = int(0.95 * size)  # most of such a small one is the table of its tokens, which stays
    load(sd3[0])
    models, report = apply(weights + LEAST_FREE + RESERVE, sd3[0], clip=clip)
    assert "Text encoding" in report
    assert torch.equal(encode(models.clip), wanted)
    assert 0 < models.clip.patcher.loaded_size() <= gpu.used <= weights
    assert torch.equal(encode(models.clip.clone()), wanted)
    assert torch.equal(encode(clip), wanted)
    assert clip.patcher.loaded_size() == size


def test_on_the_cpu_nothing_changes(sd3: Any) -> None:
    import comfy.model_management

    packed, _ = sd3
    models, report = apply(64 * GIGABYTE, packed)
    assert models.model is packed
    assert report.startswith("ComfyUI runs on the CPU")
    needed = 2 * GIGABYTE
    small, report = apply(needed, packed)
    assert small.model is packed
    assert "Sampling" in report
    least = comfy.model_management.minimum_inference_memory()
    with pytest.raises(SnugError, match=r"too small: sampling needs at least 1\.\d GB"):
        apply(least, packed)
    _, report = apply(least + 0.9 * packed.model_size(), packed)
    assert "streamed, of " in report
    assert report.count("CPU") == 1, "said twice"


def test_a_budget_larger_than_the_gpu_is_that_of_the_gpu(sd3: Any, gpu: SimulatedGPU) -> None:
    packed, _ = sd3
    gpu.holds(packed)
    gpu.total = computing(packed) + packed.model_size() // 2
    models, report = apply(8 * GIGABYTE, packed)
    assert report.startswith("The GPU has ")
    load(models.model)
    assert gpu.used <= packed.model_size() // 2


def test_what_is_computed_counts(sd3: Any, gpu: SimulatedGPU) -> None:
    packed, _ = sd3
    gpu.holds(packed)
    small, large = computing(packed), computing(packed, 64)
    assert large > small
    budget = packed.model_size() + small
    assert "streamed" not in apply(budget, packed)[1]
    for latent, size in ((None, 512), ({"samples": torch.zeros(1, 16, 64, 64)}, 64)):
        with pytest.raises(SnugError, match="choose a lower resolution"):
            apply(budget, packed, latent, size)
        assert "streamed" not in apply(packed.model_size() + large, packed, latent, size)[1]
    # Of other channels, as the empty latent of another model: ComfyUI makes it fit.
    assert "1 × 16 × 8 × 8" in apply(budget, packed, latent={"samples": torch.zeros(1, 4, 8, 8)}, size=512)[1]


def test_formats_are_named(twins: Callable[[str, str], Twins], gpu: SimulatedGPU) -> None:
    packed, dense = twins("sd3", "Q4_0").load()
    gpu.holds(packed, dense)
    assert "model (SD3, Q4_0" in apply(GIGABYTE, packed)[1]
    assert "model (SD3, float32)" in apply(GIGABYTE, dense)[1]
