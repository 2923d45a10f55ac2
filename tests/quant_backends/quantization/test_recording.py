"""What is recorded equals what the layers were given, and nothing of the recording is left behind."""

from __future__ import annotations

import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.quantization.calibration import Calibration
from snug.quant_backends.quantization.recording import Recorder


class Network(torch.nn.Module):
    """One layer of each kind, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.video = torch.nn.Conv3d(8, 4, 1)
        self.down = torch.nn.Linear(16, 5)
        self.unused = torch.nn.Linear(4, 4)
        self.up = torch.nn.ConvTranspose2d(8, 3, 1)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        found = self.conv(image)
        self.video(found[:, :, None])
        self.up(found)
        return self.down(input=tokens)


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 6, 5, generator=generator) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1) + 0.5
    tokens = torch.randn(2, 7, 16, generator=generator) * torch.arange(16)
    return image.to(dtype), tokens.to(dtype)


def record(network: torch.nn.Module, *seeds: int, dtype: torch.dtype = torch.float32) -> Calibration:
    with torch.no_grad(), Recorder(network) as recorder:
        for seed in seeds:
            network(*inputs(seed, dtype))
    return recorder.calibration(samples=len(seeds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_the_inputs(dtype: torch.dtype) -> None:
    network = Network().to(dtype)
    found = record(network, 1, 2, dtype=dtype)
    pairs = [inputs(seed, dtype) for seed in (1, 2)]
    images = torch.cat([image for image, _ in pairs]).double().movedim(1, -1).reshape(-1, 3)
    tokens = torch.cat([tokens for _, tokens in pairs]).double().reshape(-1, 16)
    assert set(found.layers) == {"conv", "video", "down"}
    for name, seen in (("conv", images), ("down", tokens)):
        layer = found.layers[name]
        assert layer.rows == len(seen)
        torch.testing.assert_close(layer.mean_square.double(), seen.square().mean(0), rtol=1e-5, atol=0)
        assert torch.equal(layer.absmax.double(), seen.abs().amax(0))
        assert layer.range.tolist() == [seen.min().item(), seen.max().item()]
        for row in [] if layer.sample is None else layer.sample:
            assert (row == seen.bfloat16()).all(1).any()
    sample = found.layers["down"].sample
    assert sample is not None and found.layers["conv"].sample is None
    assert len(sample.unique(dim=0)) > 10, "of rows of all calls"
    assert found.layers["video"].mean_square.shape == (8,)
    assert found.importance["down"] is found.layers["down"].mean_square


def test_results_and_module_stay_as_they_were() -> None:
    network = Network()
    before = network(*inputs(3))
    attributes = {name: set(module.__dict__) for name, module in network.named_modules()}
    recorder = Recorder(network)
    with pytest.raises(KeyboardInterrupt), recorder:
        assert torch.equal(network(*inputs(3)), before)
        raise KeyboardInterrupt
    for name, module in network.named_modules():
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
        assert set(module.__dict__) == attributes[name]
    rows = recorder.calibration().layers["down"].rows
    network(*inputs(4))
    assert recorder.calibration().layers["down"].rows == rows
    assert recorder.idle == ["unused"]


def test_two_recordings_joined_are_one_recording() -> None:
    network = Network()
    joined, together = record(network, 1).joined(record(network, 2, 3)), record(network, 1, 2, 3)
    assert joined.info["samples"] == 3
    for name, layer in together.layers.items():
        other = joined.layers[name]
        assert other.rows == layer.rows
        torch.testing.assert_close(other.mean_square, layer.mean_square)
        assert torch.equal(other.absmax, layer.absmax)
        assert torch.equal(other.range, layer.range)
        assert (other.sample is None) == (layer.sample is None)
        assert other.sample is None or other.sample.shape == (32, 16)
    network.down = torch.nn.Linear(8, 5)
    with Recorder(network) as recorder:
        network(inputs(1)[0], torch.ones(1, 8))
    with pytest.raises(SnugError, match="down has 16 input channels in one and 8 in the other"):
        joined.joined(recorder.calibration())


def test_useless_recordings_are_refused() -> None:
    network = Network()
    with pytest.raises(SnugError, match="Nothing was recorded"):
        Recorder(network).calibration()
    with Recorder(network) as recorder:
        network(inputs(1)[0], torch.full((1, 16), torch.inf))
    with pytest.raises(SnugError, match="Layer down was given values that are not finite"):
        recorder.calibration()
    with Recorder(network) as recorder, pytest.raises(RuntimeError):
        network(inputs(1)[0], torch.ones(1, 3))  # of a width that the layer refuses itself
    assert "down" in recorder.idle
