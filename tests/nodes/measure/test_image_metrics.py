"""PSNR and SSIM against scikit-image, and on pictures whose figures are known."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return importlib.import_module("snug.nodes.measure.image_metrics").psnr(a, b)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return importlib.import_module("snug.nodes.measure.image_metrics").ssim(a, b)


def pictures(*shape: int, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch that is smooth in places, and the same with noise that differs from picture to picture."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, height, width, channels = shape
    ramp = torch.linspace(0, 1, width).view(1, 1, width, 1) * torch.linspace(0.2, 1, height).view(
        1, height, 1, 1
    )
    a = (ramp + 0.2 * torch.rand(shape, generator=generator)).clamp(0, 1)
    spread = noise * torch.arange(1, n + 1).view(n, 1, 1, 1)
    return a, (a + spread * torch.randn(n, height, width, channels, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("shape", [(3, 48, 64, 3), (1, 11, 11, 3), (2, 11, 40, 1), (1, 200, 13, 4)])
def test_both_equal_scikit_images(shape: tuple[int, ...]) -> None:
    a, b = pictures(*shape)
    for index in range(len(a)):
        x, y = a[index].double().numpy(), b[index].double().numpy()
        similarity = structural_similarity(
            x, y, channel_axis=-1, data_range=1, gaussian_weights=True, use_sample_covariance=False
        )
        assert float(ssim(a, b)[index]) == pytest.approx(similarity, abs=1e-5)
        ratio = peak_signal_noise_ratio(x, y, data_range=1)
        assert float(psnr(a, b)[index]) == pytest.approx(ratio, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    a, b = (picture.to(dtype) for picture in pictures(2, 16, 16, 3))
    assert psnr(a, b).dtype == ssim(a, b).dtype == torch.float32
    assert torch.allclose(ssim(a, b), ssim(a.float(), b.float()))


def test_equal_pictures() -> None:
    a, _ = pictures(2, 16, 16, 3)
    assert psnr(a, a).tolist() == [math.inf, math.inf]
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    black = torch.zeros(1, 16, 16, 3)
    assert ssim(black, black).item() == 1
    # Mean squared error 1; similarity is C1 / (1 + C1) where both are flat.
    assert psnr(black, black + 1).item() == 0
    assert ssim(black, black + 1).item() == pytest.approx(1e-4 / 1.0001, rel=1e-4)


def test_refusals() -> None:
    a, b = pictures(2, 16, 16, 3)
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match="differ in size"):
            measure(a, b[:1])
        with pytest.raises(ValueError, match=r"\[N, height, width, channels\]"):
            measure(a[0], b[0])
    with pytest.raises(ValueError, match="at least 11x11 pixels, these are 16x10"):
        ssim(a[:, :10], b[:, :10])
