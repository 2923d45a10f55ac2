"""Recording what reaches the layers of a network, for a calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..core.errors import SnugError
from .calibration import Calibration, LayerStatistics

# Rows of each linear layer's input that are kept: enough to compare ways of rounding, and 2 bytes an element.
SAMPLE_ROWS = 32
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


class Recorder:
    """Records the inputs of the linear and convolution layers of a module, for as long as its block runs::

        with Recorder(network) as recorder:
            network(...)
        save_calibration(recorder.calibration(samples=1), path)

    Sums are kept where `device` says (default: where the layer's weight is now), and nothing is read back before
    `calibration`. What the network computes does not change. Layers that are never called are left out, as are calls
    with an input of another width than the layer has.
    """

    def __init__(self, network: torch.nn.Module, device: torch.device | None = None) -> None:
        self._sums = {name: _Sums(layer, device) for name, layer in recordable_layers(network)}
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for sums in self._sums.values():
            self._handles.append(sums.layer.register_forward_pre_hook(sums.add, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def idle(self) -> list[str]:
        """Names of the layers that have not been called."""
        return [name for name, sums in self._sums.items() if not sums.rows]

    def calibration(self, **info: Any) -> Calibration:
        """What was recorded so far; info: for `Calibration.info`.

        Raises SnugError when nothing was recorded, or a layer was given values that are not finite.
        """
        layers = {name: sums.statistics() for name, sums in self._sums.items() if sums.rows}
        if not layers:
            raise SnugError("Nothing was recorded: no linear or convolution layer of the network was called.")
        for name, found in layers.items():
            if not torch.isfinite(found.mean_square).all():
                raise SnugError(
                    f"Layer {name} was given values that are not finite, so that there is nothing to learn from this "
                    f"run; look at the images that it makes, and try compute dtype bf16 or fp32."
                )
        return Calibration(layers, info)


def recordable_layers(network: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, layer) of the linear and convolution layers; layer classes that only look like torch's count."""
    for name, layer in network.named_modules():
        if input_channels(layer) and getattr(layer, "weight", None) is not None:
            yield name, layer


def input_channels(layer: torch.nn.Module) -> int:
    """How many channels a linear or convolution layer is given; 0 for other modules."""
    if isinstance(layer, _CONVOLUTIONS):
        return layer.in_channels
    features = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    return features[0] if all(isinstance(count, int) for count in features) else 0  # type: ignore[return-value]


class _Sums:
    """What is accumulated for one layer, as float32 [in] each on one device."""

    def __init__(self, layer: torch.nn.Module, device: torch.device | None) -> None:
        self.layer, self.rows, self.spatial = layer, 0, 0
        if isinstance(layer, _CONVOLUTIONS):
            self.spatial = len(layer.kernel_size)
        device = layer.weight.device if device is None else device  # type: ignore[union-attr]
        self.channels = input_channels(layer)
        # Now rather than in the first call: memory that is allocated in a forward and kept breaks CUDA graphs.
        self.squares = torch.zeros(self.channels, device=device)
        self.least = torch.full((self.channels,), torch.inf, device=device)
        self.largest = torch.full((self.channels,), -torch.inf, device=device)
        self.sample: torch.Tensor | None = None
        if not self.spatial:
            self.sample = torch.zeros((SAMPLE_ROWS, self.channels), dtype=torch.bfloat16, device=device)
            # Its own: the sampler's noise must not depend on whether something is recorded.
            self.random = torch.Generator(device).manual_seed(0)

    @torch.no_grad()
    def add(self, _layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the layer's forward."""
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() <= self.spatial:
            return
        axis = x.dim() - 1 - self.spatial
        if x.shape[axis] != self.channels or x.numel() == 0:
            return
        others = [dim for dim in range(x.dim()) if dim != axis] or None
        if others is None:
            x, others = x[None], [0]
        device = self.squares.device
        self._keep_some(x)
        self.rows += x.numel() // self.channels
        self.squares.add_(_square_sums(x, others).to(device))
        torch.minimum(self.least, x.amin(others).float().to(device), out=self.least)
        torch.maximum(self.largest, x.amax(others).float().to(device), out=self.largest)

    def _keep_some(self, x: torch.Tensor) -> None:
        """Lets each row seen so far be in the sample with the same probability."""
        if self.sample is None:
            return
        rows, device = x.reshape(-1, self.channels), self.sample.device
        chosen = torch.randint(len(rows), (SAMPLE_ROWS,), generator=self.random, device=device)
        replaced = torch.rand((SAMPLE_ROWS, 1), generator=self.random, device=device)
        fresh = rows[chosen.to(x.device)].to(device, self.sample.dtype)
        share = len(rows) / (self.rows + len(rows))
        self.sample.copy_(torch.where(replaced < share, fresh, self.sample))

    def statistics(self) -> LayerStatistics:
        least, largest = self.least.cpu(), self.largest.cpu()
        return LayerStatistics(
            self.squares.cpu() / self.rows,
            torch.maximum(largest, -least),
            torch.stack([least.amin(), largest.amax()]),
            self.rows,
            None if self.sample is None else self.sample.cpu(),
        )


def _square_sums(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """Sums of squares over `dims` in float32. A norm needs no copy of x, but is many times slower on a CPU."""
    if x.device.type == "cpu":
        return x.float().square().sum(dims)
    return torch.linalg.vector_norm(x, dim=dims, dtype=torch.float32).square_()
