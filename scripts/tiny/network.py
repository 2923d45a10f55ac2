"""A tiny model loaded by ComfyUI, its linear layers, and what it computes for prompts that are random numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .build import make_tiny_model

# Width of the prompt, and of its pooled form where there is one.
PROMPTS = {"flux": (512, 768), "sd3": (4096, 2048), "sdxl": (2048, 2816), "wan": (4096, 0)}
TOKENS = 32


class TinyNetwork:
    """Of a family in PROMPTS, in float32. network: the module. linears: its linear layers; dense: their weights.

    Writes the model's file into `folder`. Needs ComfyUI on `sys.path` and, for Flux, its head counts relaxed (see
    `Family.needs_test_node`). latent: width and height of what it denoises.
    """

    def __init__(self, family: str, folder: Path, latent: int = 8) -> None:
        path = folder / f"{family}.safetensors"
        make_tiny_model(family, path)
        load = importlib.import_module("comfy.sd").load_diffusion_model
        self.family, self.latent = family, latent
        self.patcher = load(str(path), model_options={"dtype": torch.float32})
        self.network: torch.nn.Module = self.patcher.model.diffusion_model
        self.linears = {
            name: layer for name, layer in self.network.named_modules() if isinstance(layer, torch.nn.Linear)
        }
        self.dense = {name: layer.weight.detach().clone() for name, layer in self.linears.items()}

    def put(self, name: str, weight: torch.Tensor) -> None:
        """Another weight into a linear layer."""
        self.linears[name].weight.data = weight

    def put_forward(
        self, name: str, forward: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    ) -> None:
        """Another way to calculate a linear layer, of its input and its bias."""
        layer = self.linears[name]
        layer.__dict__["forward"] = lambda x: forward(x, layer.bias)

    def restore(self) -> None:
        """The weights that the model came with, and its own way to calculate with them."""
        for name, weight in self.dense.items():
            self.linears[name].__dict__.pop("forward", None)
            self.put(name, weight)

    def outputs(self, seeds: Sequence[int]) -> list[torch.Tensor]:
        """One denoising step for each seed: of the latent, the prompt and the noise level."""
        return [self._output(seed) for seed in seeds]

    def error(self, exact: Sequence[torch.Tensor], seeds: Sequence[int]) -> float:
        """Relative error of the outputs (root mean square over the seeds of L2 norms), exact: those without one."""
        found = self.outputs(seeds)
        squares = [((a - b).norm() / b.norm()).square() for a, b in zip(found, exact, strict=True)]
        return torch.stack(squares).mean().sqrt().item()

    @torch.no_grad()
    def _output(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        model, (width, pooled) = self.patcher.model, PROMPTS[self.family]
        frames = (1,) if self.family == "wan" else ()
        latent = torch.randn(
            1, model.latent_format.latent_channels, *frames, *2 * (self.latent,), generator=generator
        )
        extra = {"y": torch.randn(1, pooled, generator=generator)} if pooled else {}
        if self.family == "flux":
            extra["guidance"] = torch.tensor([3.5])
        context = torch.randn(1, TOKENS, width, generator=generator)
        sigma = model.model_sampling.sigma_max * torch.full((1,), 0.3 + 0.1 * (seed % 5))
        return model.apply_model(latent, sigma, c_crossattn=context, **extra)
