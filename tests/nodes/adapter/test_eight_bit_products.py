"""Models that multiply in 8 bits, through the real sampler: how exact, and that everything else goes on working."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from memory_states import load_half, load_nothing, load_whole
from workflows import SETUPS

# Prompts to calibrate with, and others to judge by.
SEEN, HELD_BACK = (2, 3, 4, 5), (11, 12)


def prompt(family: str, seed: int) -> list[Any]:
    """Text embeddings differ from token to token and prompt to prompt; what their channels are like does not, as with
    real text encoders.
    """
    setup = SETUPS[family]
    same, own = (torch.Generator().manual_seed(number) for number in (1, seed + 100))
    tokens, width = setup.embedding
    channels = torch.exp(0.7 * torch.randn(width, generator=same))
    extras = {}
    if setup.pooled:
        pooled = torch.randn(1, setup.pooled, generator=same)
        extras["pooled_output"] = pooled + 0.5 * torch.randn(1, setup.pooled, generator=own)
    return [[torch.randn(1, tokens, width, generator=own) * channels, extras]]


def latent(family: str) -> torch.Tensor:
    return torch.zeros(1, 16, 2, 16, 16) if SETUPS[family].frames else torch.zeros(1, 16, 16, 16)


def sample(patcher: Any, family: str, seed: int) -> torch.Tensor:
    import comfy.sample

    image = latent(family)
    noise = comfy.sample.prepare_noise(image, seed)
    prompts = prompt(family, seed), prompt(family, 0)
    return comfy.sample.sample(
        patcher, noise, 2, 2.0, "euler", "simple", *prompts, image, disable_pbar=True, seed=seed
    )


def calibration(patcher: Any, family: str, seeds: Sequence[int] = SEEN) -> Any:
    from snug.nodes.adapter.calibration import Keep, Sampling, calibrate_model

    positives = [prompt(family, seed) for seed in seeds]
    sampling = Sampling(1, 2, 2.0, "euler", "simple")
    return calibrate_model(
        patcher, positives, prompt(family, 0), {"samples": latent(family)}, sampling, Keep()
    )[0]


def quantize(patcher: Any, target: str, **settings: Any) -> tuple[Any, str]:
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_model

    return quantize_model(patcher, QuantizeSettings(target, **settings))


def add_outliers(patcher: Any) -> None:
    """A few rows of the weights in blocks are larger, so that channels of the next layer's input are, as in trained
    models. Not of modulation: it would move the outliers with each prompt.
    """
    generator = torch.Generator().manual_seed(5)
    for name, module in patcher.model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear) and "blocks." in name and "modulation" not in name:
            rows = torch.randperm(module.out_features, generator=generator)[: module.out_features // 64]
            module.weight.data[rows] *= 6


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_static_is_as_good_as_dynamic_for_other_prompts(
    family: str, outliers: bool, twins: Any, model: Any
) -> None:
    _, dense = twins(family, "F32").load()
    if outliers:
        add_outliers(dense)
    wanted = [sample(dense, family, seed) for seed in HELD_BACK]
    found = calibration(dense, family)
    errors = {}
    for kind in ("INT8 dynamic", "INT8 static"):
        new, report = quantize(dense, kind, calibration=found)
        results = (sample(new, family, seed) for seed in HELD_BACK)
        errors[kind] = sum(
            model.relative_error(result, exact) for result, exact in zip(results, wanted, strict=True)
        )
    assert "in product-int8-static" in report
    assert 1e-3 < errors["INT8 static"] <= 1.1 * errors["INT8 dynamic"] < 0.3


@pytest.mark.parametrize(
    ("target", "load"),
    [
        ("INT8 static", load_whole),
        ("INT8 static", load_half),
        ("INT8 dynamic", load_nothing),
        ("FP8 static", load_half),
    ],
)
def test_loading_lora_and_copies(target: str, load: Any, twins: Any, model: Any) -> None:
    from snug.nodes.adapter.lora_mode import set_lora_mode

    _, dense = twins("sd3", "F32").load()
    found = calibration(dense, "sd3", SEEN[:1]) if "static" in target else None
    new, _ = quantize(dense, target, calibration=found)
    exact = sample(dense, "sd3", 11)
    whole = sample(new, "sd3", 11)
    assert 1e-4 < model.relative_error(whole, exact) < 0.2
    lora = model.make_lora(new.model, 1)
    change = sample(model.with_lora(dense, lora), "sd3", 11) - exact
    for mode in ("merge while dequantizing", "side branch"):
        patched, _ = set_lora_mode(model.with_lora(new, lora), mode, False)
        assert model.relative_error(sample(patched, "sd3", 11) - whole, change) < 0.2
    new.detach()
    load(new)
    offloaded = model.run(new)
    new.detach()
    assert torch.equal(model.run(new, load=True), offloaded)


def test_fused_projections_leave_products_alone(twins: Any) -> None:
    from snug.nodes.adapter.fused_projections import FusedProjections

    _, dense = twins("wan", "F32").load()
    new, _ = quantize(dense, "INT8 dynamic")
    attention = new.model.diffusion_model.blocks[0].self_attn
    layers = [attention.q, attention.k, attention.v]
    x = torch.randn(1, 64, attention.q.in_features)
    group = FusedProjections(layers)
    for number, layer in enumerate(layers):
        assert torch.equal(group.forward(number, x), layer(x))


def test_static_wants_a_calibration_of_this_model(twins: Any) -> None:
    from snug.quant_backends.core.errors import SnugError

    _, dense = twins("sd3", "F32").load()
    _, other = twins("wan", "F32").load()
    with pytest.raises(SnugError, match="INT8 static needs a calibration.*or choose INT8 dynamic"):
        quantize(dense, "INT8 static")
    with pytest.raises(SnugError, match="another model"):
        quantize(dense, "INT8 static", calibration=calibration(other, "wan", SEEN[:1]))
