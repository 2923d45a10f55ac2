from __future__ import annotations

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.formats.scaled import format_called
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.quantization import LayerInfo, make_recipe, targets
from snug.quant_backends.quantization.automatic import (
    Mix,
    automatic_mix,
    family,
    packed_bytes,
    rounding_error,
)
from snug.quant_backends.quantization.calibration import LayerStatistics

GENERATOR = torch.Generator().manual_seed(0)
SHAPES = {
    "blocks.0.up": (256, 64),
    "blocks.0.down": (64, 256),
    "blocks.1.up": (256, 64),
    "blocks.1.down": (64, 256),
    "final_layer.linear": (64, 64),
}
WEIGHTS = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}
LAYERS = [LayerInfo(name, shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()]
FIXED = 64 * 64 * 2 + 1000  # the final layer, which the defaults keep, and what is in no layer
WHOLE = FIXED + 4 * 256 * 64 * 2
TARGET = "FP8 e4m3fn per row"


def mix(budget: int, target: str = TARGET, **more) -> Mix:
    recipe = make_recipe(
        target, LAYERS, overrides=more.pop("overrides", None), importance=more.pop("importance", None)
    )
    return automatic_mix(recipe, LAYERS, lambda layer: WEIGHTS[layer.name], budget, other_bytes=1000, **more)


def test_what_fits_stays_as_it_is() -> None:
    found = mix(WHOLE)
    assert found.nbytes == WHOLE
    assert set(found.overrides.values()) == {""} and "final_layer.linear" not in found.overrides
    assert found.report().startswith("automatic mix: ") and "as it is: 4 layers, 16.00 bits" in found.report()


def test_the_most_sensitive_layers_keep_their_precision() -> None:
    sensitivity = {"blocks.0.up": 1.0, "blocks.0.down": 9.0, "blocks.1.up": 8.0, "blocks.1.down": 2.0}
    found = mix(WHOLE - 30_000, sensitivity=sensitivity)
    kept = {name for name, format in found.overrides.items() if not format}
    assert kept == {"blocks.0.down", "blocks.1.up"}
    assert found.nbytes <= WHOLE - 30_000 and found.sensitivity_known
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)


def test_bytes_are_those_of_the_weights() -> None:
    budget = WHOLE - 40_000
    found = mix(budget)
    recipe = make_recipe(TARGET, LAYERS, overrides=found.overrides)
    nbytes = 1000
    for layer in LAYERS:
        packed = recipe.quantize(layer, WEIGHTS[layer.name])
        nbytes += layer.weights * 2 if packed is None else packed.nbytes
    assert found.nbytes == nbytes <= budget


def test_a_size_that_is_too_small() -> None:
    with pytest.raises(SnugError, match="cannot be brought to .* not quantized.*at least"):
        mix(FIXED + 1000)


def test_overrides_are_kept() -> None:
    found = mix(WHOLE - 20_000, overrides={"blocks.0.up": "", "blocks.1.up": "Q8_0"})
    assert found.overrides["blocks.0.up"] == "" and found.overrides["blocks.1.up"] == "Q8_0"
    assert {layer.name for layer in found.layers} == {"blocks.0.down", "blocks.1.down"}
    assert found.nbytes <= WHOLE - 20_000


def test_progress_may_cancel() -> None:
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mix(WHOLE, progress=progress)
    assert seen == [(0, 4), (1, 4), (2, 4)]


def test_families_are_of_one_backend_and_fit_the_rows() -> None:
    for target in targets().values():
        if target.unavailable:
            continue
        recipe = make_recipe(target, LAYERS)
        for layer in LAYERS:
            formats = family(recipe, layer)
            assert bool(formats) == (recipe.format_for(layer) is not None)
            for fmt in formats:
                assert recipe.target.encode(WEIGHTS[layer.name], fmt, None).shape == layer.shape


@pytest.mark.parametrize("shape", [(384, 512), (1000, 256), (7, 1024)])
def test_bytes_are_known_beforehand(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=GENERATOR)
    for target in targets().values():
        fmt = None if target.unavailable else target.format_for(LayerInfo("blocks.0.x", shape))
        if fmt is not None:
            nbytes = target.encode(values, fmt, None).nbytes
            # Double quantization has scales of scales, for 256 of them at a time.
            assert packed_bytes(target, fmt, shape) == pytest.approx(
                nbytes, abs=64 if "double" in target.name else 0
            )


def test_errors_are_those_of_the_product() -> None:
    """Of a layer whose inputs have these mean squares."""
    fmt, target = format_called("Q4_0"), targets()["GGUF Q4_0"]
    inputs = torch.randn(4096, 256, generator=GENERATOR) * torch.linspace(0.1, 4, 256)
    weight = torch.randn(64, 256, generator=GENERATOR)
    rounded = dequantize_packed(target.encode(weight, fmt, None))
    product = inputs @ weight.T
    expected = ((inputs @ rounded.T - product).square().sum() / product.square().sum()).item()
    assert rounding_error(target, fmt, weight, inputs.square().mean(0)) == pytest.approx(expected, rel=0.05)


def test_layers_that_multiply_in_8_bits_have_no_other_formats() -> None:
    layer = LayerInfo("double_blocks.0.x", (64, 256))
    for target in ("INT8 dynamic", "bitsandbytes LLM.int8"):
        recipe = make_recipe(target, [layer], skip="")
        assert family(recipe, layer) == [recipe.format_for(layer)]
    seen = LayerStatistics(torch.ones(256), torch.ones(256), torch.tensor([-1.0, 1.0]), 1)
    recipe = make_recipe("INT8 static", [layer], skip="", statistics={layer.name: seen})
    with pytest.raises(SnugError, match="INT8 static stores every layer in 8 bits and has nothing to mix"):
        automatic_mix(recipe, [layer], lambda layer: torch.ones(layer.shape), 10**6)
