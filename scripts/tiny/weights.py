"""Random weights under which a few sampling steps stay finite and every layer shows in the result."""

from __future__ import annotations

import math

import torch

_NORM_SPREAD = 0.1
_BIAS_SPREAD = 0.2


def random_parameter(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """One float32 parameter of `shape`, its distribution chosen by name and rank.

    Vectors that scale (norms) lie around 1 and biases around 0. Matrices and convolution kernels keep the
    variance of their input: normal with standard deviation 1 / sqrt(fan in). Output and modulation layers,
    which training starts at zero, get the same, or the layers behind them would not show.
    """
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    if len(shape) <= 1:
        is_scale = name.endswith((".weight", ".scale"))
        return 1.0 + _NORM_SPREAD * values if is_scale else _BIAS_SPREAD * values
    if name.endswith((".weight", ".bias")):
        return values / math.sqrt(math.prod(shape[1:]))
    return values / math.sqrt(shape[-1])  # tables and tokens added to activations of that width
