from __future__ import annotations

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.quantization.sensitivity import measure_sensitivity


class Sum(torch.nn.Module):
    """gain_1 * first(x) + gain_2 * second(x): what an error in either does to the sum is known."""

    def __init__(self, first: float, second: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gains = (first, second)
        self.first, self.second, self.idle = (torch.nn.Linear(64, 96, dtype=dtype) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gains[0] * self.first(x) + self.gains[1] * self.second(x)


def network(dtype: torch.dtype = torch.float32) -> tuple[Sum, torch.Tensor]:
    torch.manual_seed(0)
    return Sum(1.0, 0.25, dtype).requires_grad_(False), torch.randn(2, 40, 64, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_sensitivities(dtype: torch.dtype) -> None:
    net, x = network(dtype)
    found = measure_sensitivity(net, lambda: [net(x)], ["first", "second", "idle"])
    out = net(x).float().square().sum()
    for name, gain in zip(("first", "second"), net.gains, strict=True):
        layer = getattr(net, name)
        product = gain * (layer(x) - layer.bias).float()  # the bias is never rounded
        assert found[name] == pytest.approx((product.square().sum() / out).item(), rel=0.15)
    assert found["idle"] == 0


def test_predicts_the_error_of_rounding() -> None:
    net, x = network()
    found = measure_sensitivity(net, lambda: [net(x)], ["second"])
    exact, weight = net(x), net.second.weight.clone()
    net.second.weight.copy_((weight * 40).round() / 40)
    own = (net.second.weight - weight).square().sum() / weight.square().sum()
    error = (net(x) - exact).square().sum() / exact.square().sum()
    assert error.item() == pytest.approx(found["second"] * own.item(), rel=0.2)


def test_every_output_counts_alike() -> None:
    net, x = network()
    once = measure_sensitivity(net, lambda: [net(x)], ["first"])
    twice = measure_sensitivity(net, lambda: [net(x), 1000 * net(x)], ["first"])
    assert twice["first"] == pytest.approx(once["first"], rel=1e-3)


def test_the_network_is_left_as_it_was_even_when_cancelled() -> None:
    net, x = network()
    before = net(x)

    def cancel(done: int, total: int) -> None:
        assert total == 2
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(net, lambda: [net(x)], ["first", "second"], progress=cancel)
    assert torch.equal(net(x), before)
    calls = iter(range(2))
    with pytest.raises(StopIteration):
        measure_sensitivity(net, lambda: [net(x) * (next(calls) + 1)], ["first", "second"])
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("outputs", [[], [torch.zeros(3)], [torch.tensor([1.0, torch.nan])]])
def test_outputs_that_tell_nothing(outputs: list[torch.Tensor]) -> None:
    with pytest.raises(SnugError, match="cannot be measured"):
        measure_sensitivity(torch.nn.Module(), lambda: outputs, [])
