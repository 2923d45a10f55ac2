"""LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018), from its
authors' package where that is installed with its weights. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

# Of two pictures [1, H, W, 3] from 0 to 1: 0 where they are equal, about 1 where they have nothing in common.
Distance = Callable[[torch.Tensor, torch.Tensor], float]

# AlexNet has four layers that halve the picture.
SMALLEST = 64


def find_lpips() -> tuple[Distance | None, str]:
    """The measure, or None and why there is none (empty where nobody asked for it: the package is not installed)."""
    if importlib.util.find_spec("lpips") is None or importlib.util.find_spec("torchvision") is None:
        return None, ""
    weights = _backbone()
    if not weights.is_file():
        return None, (
            f"LPIPS is left out: its package is installed but the weights of its network are not; put "
            f"{weights.name} into {weights.parent.name} of PyTorch's hub folder."
        )
    try:
        return _distance(_model(weights)), ""
    except Exception as error:  # whatever torch raises about a damaged file
        return None, f"LPIPS is left out: {weights.name} holds no weights of AlexNet ({error})."


def _backbone() -> Path:
    """Where torchvision looks for AlexNet's weights before it downloads them."""
    from torchvision.models import AlexNet_Weights

    name = AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    return Path(torch.hub.get_dir()) / "checkpoints" / name


@lru_cache(maxsize=1)
def _model(weights: Path) -> torch.nn.Module:
    """The package's model; its backbone is read here, as the package would have it downloaded and unpickled."""
    import lpips

    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    # Its slices hold AlexNet's layers under the numbers that they have there: slice2.3.weight is features.3.weight.
    names = {name: f"features.{name.partition('.')[2]}" for name in model.net.state_dict()}
    model.net.load_state_dict({name: state[found] for name, found in names.items()})
    return model.eval().requires_grad_(False)


def _distance(model: torch.nn.Module) -> Distance:
    @torch.inference_mode()
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        first, second = (image.movedim(-1, 1) for image in (a, b))
        if min(a.shape[1:3]) < SMALLEST:
            size = [max(side, SMALLEST) for side in a.shape[1:3]]
            first, second = (
                torch.nn.functional.interpolate(image, size=size, mode="nearest") for image in (first, second)
            )
        return float(model(first, second, normalize=True))

    return distance
