"""Which of ComfyUI's attention functions a MODEL uses, and in how many slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules import attention

from ...quant_backends.core.errors import SnugError

# transformer_options: called by core in place of its attention function, which it gets as its first argument.
ATTENTION_OPTION = "optimized_attention_override"
COMFYUIS_CHOICE = "ComfyUI's choice"
# These divide their work by the memory that is free at the moment, which cannot be compiled.
BY_FREE_MEMORY = ("attention_sub_quad", "attention_split")
SLICING = ("off", "auto", "2", "4", "8", "16", "32")
# Core's function that makes as many slices of the queries as the free memory asks for.
SLICING_BACKEND = "split"
PACKAGES = {
    "xformers": "the package xformers",
    "sage": "the package sageattention",
    "sage3": "the package sageattn3 and a Blackwell GPU",
    "flash": "the package flash-attn",
    "comfy_kitchen_int8": "a newer comfy-kitchen on a GPU that it supports",
}


def attention_backends() -> list[str]:
    """What can be chosen here: ComfyUI's choice, and the functions that it and other packs have registered."""
    return [COMFYUIS_CHOICE, *attention.REGISTERED_ATTENTION_FUNCTIONS]


def missing_backend(name: str) -> str | None:
    """One sentence when `name` cannot be chosen here, else None."""
    available = attention_backends()
    if name in available:
        return None
    needs = f" (it needs {PACKAGES[name]})" if name in PACKAGES else ""
    return (
        f"The attention backend '{name}' is not available in this ComfyUI{needs}; choose one of "
        f"{', '.join(available)}."
    )


def set_attention(patcher: Any, backend: str, slicing: str) -> None:
    """Sets both on a patcher that nobody else uses yet; ComfyUI's choice and "off" leave what is there.

    backend: of `attention_backends()`; slicing: of SLICING. Raises SnugError when they do not go together or
    the backend is not here.
    """
    missing = missing_backend(backend)
    if missing is not None:
        raise SnugError(missing)
    if slicing == "auto":
        if backend not in (COMFYUIS_CHOICE, SLICING_BACKEND):
            raise SnugError(
                f"Attention slicing 'auto' is done by the backend '{SLICING_BACKEND}'; choose that or "
                f"{COMFYUIS_CHOICE} with it, or a number of slices with '{backend}'."
            )
        backend = SLICING_BACKEND
    wanted = None if backend == COMFYUIS_CHOICE else backend
    slices = int(slicing) if slicing.isdecimal() else 1
    if wanted is None and slices == 1:
        return
    options = patcher.model_options["transformer_options"]
    previous = options.get(ATTENTION_OPTION)
    if isinstance(
        previous, AttentionChoice
    ):  # two in one would slice the slices, or forget what is left open here
        wanted = wanted or previous.backend
        slices = previous.slices if slicing == "off" else slices
        previous = previous.previous
    choice = AttentionChoice(wanted, slices, previous)
    whole = getattr(attention.get_attention_function(wanted or "", None), "container_function", None)
    if whole is not None and slices == 1:  # newer ComfyUI lets a backend free its inputs early
        choice.container_function = whole  # type: ignore[attr-defined]
    options[ATTENTION_OPTION] = choice


@dataclass
class AttentionChoice:
    """What core calls in place of its attention function.

    backend: the name of a registered function, None for what would be called without this; previous: another
    node's override that was there before, used when there is no backend.
    """

    backend: str | None
    slices: int
    previous: Callable[..., torch.Tensor] | None = None

    def __call__(self, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.backend is not None:
            function = attention.get_attention_function(self.backend)
        elif self.previous is not None:
            function = partial(self.previous, function)
        function = compilable(function)
        return (
            function(*args, **kwargs) if self.slices == 1 else _sliced(function, self.slices, *args, **kwargs)
        )


def ignores_options(patch: object) -> bool:
    """Whether what is found in transformer_options is an attention of Snug's, which looks at nothing else there."""
    return isinstance(patch, AttentionChoice) and patch.previous is None


def compilable(function: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function, or in compiled code one that can be compiled."""
    name = getattr(function, "__name__", "")
    return (
        attention.attention_pytorch if torch.compiler.is_compiling() and name in BY_FREE_MEMORY else function
    )


def _sliced(
    function: Callable[..., torch.Tensor],
    slices: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    *args: Any,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention over some queries at a time: each query's result depends on no other, so this is exact.

    q, k, v: [batch, tokens, heads * width], with skip_reshape [batch, heads, tokens, width]; mask: [..., queries,
    keys], where one row of queries stands for all. The result is [batch, queries, heads * width], with
    skip_output_reshape [batch, heads, queries, width].
    """
    dim = 2 if skip_reshape else 1
    tokens = q.shape[dim]
    by_query = mask is not None and mask.dim() > 1 and mask.shape[-2] == tokens
    masks = mask.tensor_split(slices, -2) if mask is not None and by_query else (mask,) * slices
    results = [
        function(
            part,
            k,
            v,
            heads,
            part_mask,
            *args,
            skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape,
            **kwargs,
        )
        for part, part_mask in zip(q.tensor_split(slices, dim), masks, strict=True)
        if part.shape[dim]
    ]
    return torch.cat(results, 2 if skip_output_reshape else 1)
