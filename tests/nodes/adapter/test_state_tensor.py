"""The stand-in that state_dict() shows for a packed weight behaves like the weight wherever it is used."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def pair(sd3: Any, model: Any) -> tuple[Any, torch.Tensor]:
    """(stand-in, the decoded weight)"""
    name, module = next(model.packed_modules(sd3[0].model.diffusion_model))
    return sd3[0].model.diffusion_model.state_dict()[f"{name}.weight"], module.dense_weight()


USES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda value: value.clone(),
    lambda value: value.detach().clone(),
    lambda value: value.data.clone(),
    lambda value: value.detach().cpu(),
    lambda value: value.to("cpu"),
    lambda value: value.float(),
    lambda value: value * 2 / 2,
    lambda value: torch.zeros(value.shape).copy_(value),
    lambda value: torch.cat([value[:5], value[5:]]),
    lambda value: copy.deepcopy(value),
    lambda value: torch.nn.Parameter(value, requires_grad=False).clone(),
]


@pytest.mark.parametrize("use", USES)
def test_values_are_the_weight(use: Callable[[torch.Tensor], torch.Tensor], pair: Any) -> None:
    stand_in, weight = pair
    result = use(stand_in)
    assert result.device.type == "cpu"
    assert torch.equal(result, weight)


def test_metadata_decodes_nothing(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in, weight = pair

    def fail(*_: Any) -> None:
        raise AssertionError("the weight was decoded")

    monkeypatch.setattr(type(stand_in.module), "dense_weight", fail)
    assert stand_in.shape == weight.shape and stand_in.dtype == weight.dtype
    assert (stand_in.ndim, stand_in.numel(), len(stand_in)) == (weight.ndim, weight.numel(), len(weight))
    assert stand_in.is_floating_point() and not stand_in.is_cuda and stand_in.is_contiguous()
    assert stand_in.nbytes == stand_in.module.weight.nbytes < weight.nbytes


def test_torch_save_writes_numbers(pair: Any) -> None:
    stand_in, weight = pair
    buffer = io.BytesIO()
    torch.save({"weight": stand_in}, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["weight"], weight)


def test_takes_the_place_of_a_parameter(pair: Any, comfy: Any) -> None:
    """As Control-LoRA does with a model's weights."""
    import comfy.utils

    holder = torch.nn.Linear(1, 1)
    comfy.utils.set_attr_param(holder, "weight", pair[0])
    assert torch.equal(holder.weight.clone(), pair[1])


def test_loads_into_a_dense_layer(pair: Any) -> None:
    stand_in, weight = pair
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.load_state_dict({"weight": stand_in})
    assert torch.equal(layer.weight, weight)
