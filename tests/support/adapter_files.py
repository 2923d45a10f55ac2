"""Weight adapters of every kind that ComfyUI knows, as LoRA files have them, for layers by name and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Tensors = dict[str, torch.Tensor]
_RANK = 4


def _lora(rows: int, columns: int, random: Callable[..., torch.Tensor]) -> Tensors:
    down, up = random(_RANK, columns) / columns**0.5, random(rows, _RANK) * 0.3 / _RANK**0.5
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0 * _RANK)}


def _dora(rows: int, columns: int, random: Callable[..., torch.Tensor]) -> Tensors:
    return {**_lora(rows, columns, random), "dora_scale": 1 + 0.3 * random(rows, 1).abs()}


def _loha(rows: int, columns: int, random: Callable[..., torch.Tensor]) -> Tensors:
    size = (columns * _RANK**2) ** -0.25
    return {
        "hada_w1_a": random(rows, _RANK) * size,
        "hada_w1_b": random(_RANK, columns) * size,
        "hada_w2_a": random(rows, _RANK) * size,
        "hada_w2_b": random(_RANK, columns) * size,
        "alpha": torch.tensor(float(_RANK)),
    }


def _lokr(rows: int, columns: int, random: Callable[..., torch.Tensor]) -> Tensors:
    return {"lokr_w1": random(4, 4) * 0.3, "lokr_w2": random(rows // 4, columns // 4) / columns**0.5}


def _oft(rows: int, columns: int, random: Callable[..., torch.Tensor]) -> Tensors:
    return {"oft_blocks": random(rows // 8, 8, 8) * 0.1}


ADAPTERS = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr, "DoRA": _dora, "OFT": _oft}
COSTLY = tuple(name for name in ADAPTERS if name != "LoRA")


def make_adapter(kind: str, shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> Tensors:
    """An adapter of `kind` (of ADAPTERS) for each matrix whose sides are multiples of 8, strong enough to see."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        f"{name}.{part}": value
        for name, shape in shapes.items()
        if len(shape) == 2 and not (shape[0] % 8 or shape[1] % 8)
        for part, value in ADAPTERS[kind](*shape, random).items()
    }
