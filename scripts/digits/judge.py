"""A classifier that says which digit a picture shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.svm import SVC


class Judge:
    """A support vector machine over the brightness of a picture in 8x8 cells.

    pictures: of real digits, float [N, height, width, 3] from 0 to 1, as the VAE decodes them. classes: int [N].
    """

    def __init__(self, pictures: torch.Tensor, classes: torch.Tensor) -> None:
        self.machine = SVC(gamma="scale", C=10.0).fit(_cells(pictures), classes.numpy())

    def accuracy(self, pictures: torch.Tensor, classes: torch.Tensor) -> float:
        """Share of the pictures that show the digit they should, from 0 to 1."""
        return float((self.classify(pictures) == classes).float().mean())

    def classify(self, pictures: torch.Tensor) -> torch.Tensor:
        """int64 [N]: the digit of each."""
        return torch.from_numpy(self.machine.predict(_cells(pictures))).long()


def _cells(pictures: torch.Tensor):
    brightness = pictures.float().mean(dim=-1, keepdim=True).movedim(-1, 1)
    return F.adaptive_avg_pool2d(brightness, 8).flatten(1).numpy()
