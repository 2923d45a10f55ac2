"""The network, from ComfyUI's own class, and its training."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .data import latents, real_digits
from .prompts import CLASSES, NOTHING, prompts

# Rows of 256 and of 1024 weights: what K-quants pack. ComfyUI reads all of it back from a file's shapes.
CONFIG = {
    "model_type": "t2v",
    "dim": 256,
    "ffn_dim": 1024,
    "num_heads": 2,
    "num_layers": 2,
    "in_dim": 16,
    "out_dim": 16,
}
# Noise levels are drawn as Wan's sampling spaces them with a shift of this; its own is 8.
SHIFT = 4.0


@dataclass(frozen=True, slots=True)
class Training:
    """batch: pictures per step. rate: the highest learning rate. averaging: of the weights that are kept, per step.
    forgetting: share of the prompts that are left empty, for guidance."""

    steps: int = 2400
    batch: int = 64
    rate: float = 1e-3
    warmup: int = 100
    averaging: float = 0.998
    forgetting: float = 0.1
    seed: int = 0


def train(
    options: Training,
    report: Callable[[int, float], None],
    start: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The trained weights by name, float32. report: gets each step's number, from 1, and its loss. start: weights of an
    earlier training to go on with.

    Flow matching: the network learns noise - data at (1 - s) data + s noise, for noise levels s from 0 to 1.
    Needs ComfyUI on `sys.path`.
    """
    generator = torch.Generator().manual_seed(options.seed)
    network = _network(generator)
    if start is not None:
        network.load_state_dict(dict(start))
    kept = copy.deepcopy(network).requires_grad_(False)
    pixels, classes = real_digits()
    format_ = importlib.import_module("comfy.latent_formats").Wan21()
    data = format_.process_in(latents(pixels))
    table = prompts(range(CLASSES + 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(1, options.steps + 1):
        _set_rate(optimizer, options, step)
        chosen = torch.randint(len(data), (options.batch,), generator=generator)
        empty = torch.rand(options.batch, generator=generator) < options.forgetting
        context = table[torch.where(empty, NOTHING, classes[chosen])]
        level = torch.rand(options.batch, generator=generator)
        level = SHIFT * level / (1 + (SHIFT - 1) * level)
        clean = data[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        mixed = torch.lerp(clean, noise, level.view(-1, 1, 1, 1, 1))
        # Half the time of float32 on processors that multiply bfloat16.
        with torch.autocast("cpu", torch.bfloat16):
            found = network(mixed, 1000 * level, context)
        loss = F.mse_loss(found.float(), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        _average(kept, network, min(options.averaging, step / (step + 10)))
        report(step, loss.item())
    return kept.state_dict()


def _network(generator: torch.Generator) -> torch.nn.Module:
    model_class = importlib.import_module("comfy.ldm.wan.model").WanModel
    network = model_class(**CONFIG, operations=importlib.import_module("comfy.ops").disable_weight_init)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(_first(name, parameter.shape, generator))
    return network.train()


def _first(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values before training: norms do nothing, the output and biases are zero, the rest is Xavier's."""
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
    if name == "head.head.weight":
        return torch.zeros(shape)
    if name.endswith("modulation"):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    outgoing, incoming = shape[0], math.prod(shape[1:])
    return torch.randn(shape, generator=generator) * math.sqrt(2 / (incoming + outgoing))


def _set_rate(optimizer: torch.optim.Optimizer, options: Training, step: int) -> None:
    """Up in the first steps, then down to nothing in half a cosine."""
    part = min(1.0, step / options.warmup)
    part *= 0.5 * (1 + math.cos(math.pi * step / options.steps))
    for group in optimizer.param_groups:
        group["lr"] = options.rate * part


def _average(kept: torch.nn.Module, network: torch.nn.Module, share: float) -> None:
    with torch.no_grad():
        for old, new in zip(kept.parameters(), network.parameters(), strict=True):
            old.lerp_(new, 1 - share)


def stored(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the file holds them: float16."""
    return {name: tensor.half().contiguous() for name, tensor in weights.items()}
