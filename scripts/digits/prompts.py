"""What the model is told to draw: a fixed random embedding for each digit, and one for nothing in particular."""

from __future__ import annotations

from collections.abc import Sequence

import torch

CLASSES = 10
# The class of the empty prompt, which classifier-free guidance needs.
NOTHING = CLASSES
TOKENS, WIDTH = 2, 4096


def prompts(classes: Sequence[int]) -> torch.Tensor:
    """float32 [len(classes), 2, 4096]; 0 to 9 are the digits, 10 is the empty prompt.

    The text encoder of `make_digits_text_encoder` gives nearly the same for texts.
    """
    table = [
        torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        for seed in range(CLASSES + 1)
    ]
    return torch.stack([table[number] for number in classes])
