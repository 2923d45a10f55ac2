"""Measuring, while a MODEL samples, how much its output depends on each layer: what the automatic mix goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...quant_backends.quantization.sensitivity import measure_sensitivity


def sensitivity_while(sample: Callable[[], None], network: torch.nn.Module, steps: int) -> dict[str, float]:
    """The sensitivity of the linear layers of `network`, the mean of up to three calls: early, in the middle and late.

    sample: calls the network, about once for each of `steps`. At these calls it is run anew with the same inputs, once
    for each layer: with the weights, patches and options that it has then. Shows progress, and stops when the user
    cancels; nothing stays on the network. Raises SnugError when what the network computes is not finite.
    """
    names = [name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
    moments = {0, steps // 2, steps - 1}
    bar = comfy.utils.ProgressBar(len(moments) * max(1, len(names)))
    found: list[dict[str, float]] = []
    calls = 0

    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(len(found) * total + done)

    def measure(_network: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls - 1 in moments:
            found.append(
                measure_sensitivity(
                    network, lambda: _tensors(network.forward(*args, **kwargs)), names, progress=progress
                )
            )

    handle = network.register_forward_hook(measure, with_kwargs=True)
    try:
        sample()
    finally:
        handle.remove()
    return {name: sum(one[name] for one in found) / len(found) for name in names} if found else {}


def _tensors(output: Any) -> list[torch.Tensor]:
    """What a network returns: a tensor, or for sound beside pictures several."""
    values = [output] if isinstance(output, torch.Tensor) else output
    return [value for value in values if isinstance(value, torch.Tensor)]
