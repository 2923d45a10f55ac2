"""How near a picture is to another: PSNR and SSIM of ComfyUI's IMAGE tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# SSIM as its authors use it (Wang, Bovik, Sheikh, Simoncelli: "Image Quality Assessment: From Error Visibility to
# Structural Similarity", 2004): a Gaussian window, and constants for values from 0 to 1.
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB, 10 log10(1 / mean squared error); inf where they are equal.

    a, b: [N, H, W, C] of one shape, any float dtype, values from 0 to 1. Returns float32 [N].
    Raises ValueError where the shapes differ or are not those of pictures.
    """
    _check(a, b)
    # A picture at a time: a float32 copy of a whole batch of large ones would be as large as the batch.
    errors = [(x.float() - y.float()).square().mean() for x, y in zip(a, b, strict=True)]
    return -10 * torch.log10(torch.stack(errors))


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture, at most 1 (equal): the mean over channels and places of the window.

    The window stays inside the picture. a, b, the result and errors as for `psnr`; besides, ValueError for pictures
    that are narrower or lower than the window of 11 pixels.
    """
    _check(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW} pixels, these are {_size(a)}")
    window = torch.exp(-(torch.arange(WINDOW, device=a.device) - WINDOW // 2).square() / (2 * SIGMA**2))
    window /= window.sum()
    return torch.stack([_ssim(x.float(), y.float(), window) for x, y in zip(a, b, strict=True)])


def _ssim(a: torch.Tensor, b: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Of two pictures [H, W, C]; a number."""
    x, y = a.movedim(-1, 0), b.movedim(-1, 0)
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack((x, y, x * x, y * y, x * y)), window)
    variances = xx - mean_x * mean_x + (yy - mean_y * mean_y)
    covariance = xy - mean_x * mean_y
    above = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    below = (mean_x * mean_x + mean_y * mean_y + C1) * (variances + C2)
    return (above / below).mean()


def _blur(planes: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """[..., H, W] to the windowed means, [..., H - 10, W - 10]."""
    flat = planes.flatten(0, -3).unsqueeze(1)
    flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return flat.view(*planes.shape[:-2], *flat.shape[-2:])


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"the pictures differ in size: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim != 4 or a.shape[0] == 0:
        raise ValueError(f"pictures are [N, height, width, channels], not {tuple(a.shape)}")


def _size(pictures: torch.Tensor) -> str:
    return f"{pictures.shape[2]}x{pictures.shape[1]}"
