"""How much each layer's weight matters to what the whole network computes, measured by disturbing one at a time.

A layer's product is given an error like the one that rounding its weight makes: a fixed random matrix times the
layer's input, of a known size beside the product. What comes out of the network then differs; the square of that
difference, beside the square of the disturbance, is the layer's sensitivity. Errors of several layers add up nearly as
their squares do, so that the error of a mix of formats is the sum of sensitivity times the layer's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ..core.errors import SnugError

# Error of the product beside the product: that of about 4 bits, well above the rounding of 16-bit numbers.
STRENGTH = 0.05


@torch.no_grad()
def measure_sensitivity(
    network: torch.nn.Module,
    run: Callable[[], Sequence[torch.Tensor]],
    names: Collection[str],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Squared relative error of the network's outputs for a squared relative error of 1 in the product of each layer.

    run: computes the network's outputs for the same inputs each time, at least one; each counts alike.
    names: linear layers of `network`, however their weights are stored. Those that do not run get 0.
    progress: called with the layers done and their number; may raise to cancel. The network is left as it was.

    Takes one more run than there are names. Raises SnugError when the outputs are not finite or all zero.
    """
    reference = [output.detach().float().clone() for output in run()]
    if not reference or not all(torch.isfinite(output).all() and output.any() for output in reference):
        raise SnugError(
            "The sensitivity of layers cannot be measured: what the model computes here is empty, zero or not finite; "
            "look at the images that it makes, and try compute dtype bf16 or fp32."
        )
    found = {}
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names))
        handle = network.get_submodule(name).register_forward_hook(_Disturbance(seed))
        try:
            outputs = run()
        finally:
            handle.remove()
        errors = [_relative(output, before) for output, before in zip(outputs, reference, strict=True)]
        found[name] = torch.stack(errors).mean()
    if progress is not None:
        progress(len(names), len(names))
    return {name: error.item() / STRENGTH**2 for name, error in found.items()}  # read back once, at the end


def _relative(output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (output.float() - reference).square().sum() / reference.square().sum()


class _Disturbance:
    """A hook behind a linear layer; the same matrix for all of the layer's calls, as a rounded weight would be."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.matrix: torch.Tensor | None = None

    def __call__(self, layer: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        x, product = args[0].float(), output.float()
        if self.matrix is None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            shape = (output.shape[-1], x.shape[-1])
            self.matrix = torch.randn(shape, generator=generator, device=x.device)
        bias = getattr(layer, "bias", None)
        if isinstance(bias, torch.Tensor):
            product = product - bias.detach().to(product.device, torch.float32)
        error = torch.nn.functional.linear(x, self.matrix)
        error *= STRENGTH * _size(product) / _size(error).clamp_min(torch.finfo(torch.float32).tiny)
        return (output.float() + error).to(output.dtype)


def _size(values: torch.Tensor) -> torch.Tensor:
    """Root mean square of each channel, [channels]."""
    return values.reshape(-1, values.shape[-1]).square().mean(0).sqrt()
