"""The automatic mix against one format for all, at the same size, in real models: tiny Flux, SD3 and Wan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow_models import accept_narrow_models
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.quantization import LayerInfo, automatic, make_recipe
from snug.quant_backends.quantization.automatic import automatic_mix
from snug.quant_backends.quantization.recipe import Recipe
from snug.quant_backends.quantization.sensitivity import measure_sensitivity
from tiny import make_tiny_model

FAMILIES = {"flux": (512, 768), "sd3": (4096, 2048), "wan": (4096, 0)}
MEASURED, HELD_BACK = (1, 2), (7, 8)


class Model:
    """A tiny model in float32, its quantizable layers, and outputs for prompts that are random numbers."""

    def __init__(self, family: str, folder: Path) -> None:
        import comfy.sd

        path = folder / f"{family}.safetensors"
        make_tiny_model(family, path)
        self.family = family
        self.patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
        self.network = self.patcher.model.diffusion_model
        self.linears = {
            name: layer for name, layer in self.network.named_modules() if isinstance(layer, torch.nn.Linear)
        }
        self.dense = {name: layer.weight.detach().clone() for name, layer in self.linears.items()}
        self.layers = [
            LayerInfo(name, tuple(weight.shape), dtype=torch.float16) for name, weight in self.dense.items()
        ]

    def recipe(self, target: str, **more: Any) -> Recipe:
        return make_recipe(target, self.layers, list(self.network.state_dict()), **more)

    def outputs(self, seeds: tuple[int, ...]) -> list[torch.Tensor]:
        return [self._output(seed) for seed in seeds]

    def _output(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        model, (width, pooled) = self.patcher.model, FAMILIES[self.family]
        frames = (1,) if self.family == "wan" else ()
        latent = torch.randn(1, model.latent_format.latent_channels, *frames, 8, 8, generator=generator)
        extra = {"y": torch.randn(1, pooled, generator=generator)} if pooled else {}
        if self.family == "flux":
            extra["guidance"] = torch.tensor([3.5])
        context = torch.randn(1, 32, width, generator=generator)
        sigma = model.model_sampling.sigma_max * torch.full((1,), 0.3 + 0.1 * (seed % 5))
        return model.apply_model(latent, sigma, c_crossattn=context, **extra)

    def error(self, recipe: Recipe) -> tuple[float, int]:
        """(relative error of outputs that nothing was measured with, bytes of the quantizable layers)"""
        exact, nbytes = self.outputs(HELD_BACK), 0
        for layer in self.layers:
            packed = recipe.quantize(layer, self.dense[layer.name])
            if packed is not None:
                nbytes += packed.nbytes
                self.linears[layer.name].weight.data = dequantize_packed(packed)
            else:
                nbytes += layer.weights * layer.dtype.itemsize
        found = self.outputs(HELD_BACK)
        for name, weight in self.dense.items():
            self.linears[name].weight.data = weight
        squares = [((a - b).norm() / b.norm()).square() for a, b in zip(found, exact, strict=True)]
        return torch.stack(squares).mean().sqrt().item(), nbytes


@pytest.fixture(scope="module")
def tiny_model(comfy: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mix")
    with pytest.MonkeyPatch.context() as patch:
        accept_narrow_models(patch)
        yield lambda family: Model(family, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_less_error_than_one_format_at_the_same_size(
    family: str, tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "SAMPLE", 1 << 15)  # of weights that are all alike
    model = tiny_model(family)
    uniform = model.recipe("GGUF Q4_K_S", overrides={})
    one_format = {
        layer.name: "Q4_K"
        for layer in model.layers
        if layer.shape[1] % 256 == 0 and uniform.format_for(layer) is not None
    }
    error, nbytes = model.error(model.recipe("GGUF Q4_K_S", overrides=one_format))
    names = list(one_format)
    sensitivity = measure_sensitivity(model.network, lambda: model.outputs(MEASURED), names)
    assert max(sensitivity.values()) > 3 * min(sensitivity.values()), "otherwise there is nothing to choose"
    mix = automatic_mix(
        uniform, model.layers, lambda layer: model.dense[layer.name], nbytes, sensitivity=sensitivity
    )
    mixed_error, mixed_bytes = model.error(model.recipe("GGUF Q4_K_S", overrides=mix.overrides))
    assert mixed_bytes == mix.nbytes <= nbytes
    assert mixed_error <= 0.9 * error
