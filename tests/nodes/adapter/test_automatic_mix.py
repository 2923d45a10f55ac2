"""The automatic mix against one format for all, at the same size, in real models: tiny Flux, SD3 and Wan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrow_models import accept_narrow_models
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.quantization import LayerInfo, automatic, make_recipe
from snug.quant_backends.quantization.automatic import automatic_mix
from snug.quant_backends.quantization.recipe import Recipe
from snug.quant_backends.quantization.sensitivity import measure_sensitivity
from tiny.network import TinyNetwork

MEASURED, HELD_BACK = (1, 2), (7, 8)


@pytest.fixture(scope="module", params=["flux", "sd3", "wan"])
def model(comfy: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        accept_narrow_models(patch)
        yield TinyNetwork(request.param, tmp_path_factory.mktemp("mix"))


def error_and_bytes(model: TinyNetwork, layers: list[LayerInfo], recipe: Recipe) -> tuple[float, int]:
    """(relative error of outputs that nothing was measured with, bytes of the linear layers)"""
    exact, nbytes = model.outputs(HELD_BACK), 0
    for layer in layers:
        packed = recipe.quantize(layer, model.dense[layer.name])
        if packed is None:
            nbytes += layer.weights * layer.dtype.itemsize
        else:
            nbytes += packed.nbytes
            model.put(layer.name, dequantize_packed(packed))
    error = model.error(exact, HELD_BACK)
    model.restore()
    return error, nbytes


def test_less_error_than_one_format_at_the_same_size(
    model: TinyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "SAMPLE", 1 << 15)  # of weights that are all alike
    layers = [
        LayerInfo(name, tuple(weight.shape), dtype=torch.float16) for name, weight in model.dense.items()
    ]
    plain = make_recipe("GGUF Q4_K_S", layers, list(model.network.state_dict()))
    names = [layer.name for layer in layers if plain.format_for(layer) and layer.shape[1] % 256 == 0]
    uniform = make_recipe(
        "GGUF Q4_K_S", layers, list(model.network.state_dict()), overrides=dict.fromkeys(names, "Q4_K")
    )
    error, nbytes = error_and_bytes(model, layers, uniform)

    sensitivity = measure_sensitivity(model.network, lambda: model.outputs(MEASURED), names)
    assert max(sensitivity.values()) > 3 * min(sensitivity.values()), "otherwise there is nothing to choose"
    mix = automatic_mix(plain, layers, lambda layer: model.dense[layer.name], nbytes, sensitivity=sensitivity)
    mixed = make_recipe("GGUF Q4_K_S", layers, list(model.network.state_dict()), overrides=mix.overrides)
    mixed_error, mixed_bytes = error_and_bytes(model, layers, mixed)

    assert mixed_bytes == mix.nbytes <= nbytes
    assert mixed_error <= 0.9 * error
