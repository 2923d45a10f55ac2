"""Which sizes of a compiled function's arguments may change: token counts, and height and width of a latent.

torch.compile takes every size for a constant until it meets a second one, and compiles then for all of them. An image
of another size would thus compile every kind of block again, so the sizes that follow from it are variables from the
start. All others stay constants, which the compiler makes use of. A mark is a hint: where code depends on the size
after all, it becomes a constant again. Code is compiled again for marks that it was not compiled with, so what is
marked must not depend on sizes that happen to be equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

import torch


def plain_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with strides that follow from the sizes, which is what blocks but the first are given."""
    if tensor.dim() in (2, 3) and tensor.stride(-1) != 1:
        return tensor.contiguous()
    if tensor.dim() > 2 and tensor.shape[0] == 1 and tensor.is_contiguous():
        return tensor[0].unsqueeze(
            0
        )  # the stride of a batch of one may be the length of what it was cut from
    return tensor


def mark_block_sizes(arguments: Iterable[tuple[str, Any]]) -> None:
    """Marks the (named) arguments of a block: activations [batch, tokens, features], modulation [batch, features],
    masks such as [batch, 1, tokens, tokens], rotary embeddings such as [1, 1, tokens, features / 2, 2, 2].
    """
    named = [(name, tensor) for name, value in arguments for tensor in _tensors(value)]
    counts = _token_counts(tensor for _, tensor in named)
    for name, tensor in named:
        if "mask" in name:
            _mark(tensor, *range(1, tensor.dim()))
        elif tensor.dim() in (2, 3):
            _mark(tensor, *range(1, tensor.dim() - 1))
            # U-Nets have blocks of one class in several widths, which would be taken for another variable.
            torch._dynamo.mark_static(tensor, tensor.dim() - 1)
        else:
            # The first of them: what belongs to a head of attention comes behind the tokens.
            _mark(tensor, *[dim for dim, size in enumerate(tensor.shape) if size in counts][:1])


def mark_network_sizes(arguments: Iterable[tuple[str, Any]]) -> None:
    """Marks the (named) arguments of a network: latents [batch, channels, (frames,) height, width], the text
    [batch, tokens, features] and its mask.
    """
    for name, value in arguments:
        for tensor in _tensors(value):
            if "mask" in name:
                _mark(tensor, *range(1, tensor.dim()))
            elif tensor.dim() > 3:
                _mark(tensor, *range(2, tensor.dim()))
            elif tensor.dim() == 3:
                _mark(tensor, 1)


def _mark(tensor: torch.Tensor, *dims: int) -> None:
    torch._dynamo.maybe_mark_dynamic(tensor, dims)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from _tensors(member)


def _token_counts(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Those of the activations, and their sums: attention may join image and text."""
    counts = {tensor.shape[1] for tensor in tensors if tensor.dim() == 3} - {1}
    return {sum(some) for number in (1, 2, 3) for some in combinations(counts, number)}
