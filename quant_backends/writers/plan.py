"""Decides how each tensor goes into a GGUF file, before anything is written.

The rules are those of the usual converters (ComfyUI-GGUF's tools/convert.py and llama.cpp's quantizer):
vectors, tensors of at most 1024 weights, kernels of more than four dimensions and a few named parameters are
F32; of the rest, matrices take the wanted format unless their architecture keeps them or their rows are no
whole number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats import FORMATS, Format
from .mixes import Mix, block_numbers, mixed_format
from .precision import PrecisionRules

MAX_NAME = 127  # bytes; ggml's name field holds 128 with the final zero
MAX_DIMS = 4  # of a ggml tensor
MAX_SMALL = 1024  # weights; what is not larger stays F32
FOLD_WIDTH = 256  # weights per block of every K- and IQ-quant
MIN_FOLDED = 512  # weights; smaller tensors keep their shape


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the file: `shape` (torch order) as stored, `original_shape` only where it differs."""

    name: str
    format: type[Format]
    shape: tuple[int, ...]
    original_shape: tuple[int, ...] | None

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)


def plan_tensors(
    tensors: Mapping[str, torch.Tensor | PackedTensor],
    wanted: type[Format] | Mix | None,
    rules: PrecisionRules,
) -> list[PlannedTensor]:
    """What is stored how, in the order of `tensors`; dropped tensors are left out, packed ones stay as they are.

    wanted: the format of matrices, a mix that gives every matrix its own, or None for the 16 bits that suit them.
    Raises SnugError for a name longer than 127 bytes and for a tensor that is neither floating point nor packed in a
    ggml format.
    """
    plan = []
    blocks = block_numbers(tensors)
    for name in tensors:
        if rules.is_dropped(name):
            continue
        _check_name(name)
        tensor = tensors[name]
        if isinstance(tensor, PackedTensor):
            plan.append(_plan_packed(name, tensor))
            continue
        if not tensor.is_floating_point():
            raise SnugError(
                f"Tensor {name!r} is {tensor.dtype}, but only floating point weights can be written to a GGUF "
                f"file; dequantize the model first."
            )
        original = tuple(tensor.shape)
        stored = stored_shape(original, rules)
        fmt = mixed_format(wanted, name, stored, *blocks[name]) if isinstance(wanted, Mix) else wanted
        # ComfyUI-GGUF restores the original shape of F16 and F32 kernels only.
        too_deep = len(original) > MAX_DIMS
        chosen = FORMATS["F32"] if too_deep else _choose_format(name, stored, tensor.dtype, fmt, rules)
        plan.append(PlannedTensor(name, chosen, stored, original if stored != original else None))
    return plan


def _plan_packed(name: str, packed: PackedTensor) -> PlannedTensor:
    """Blocks may cross the rows of the logical shape; in the file they are rows of their own then."""
    fmt, shape = packed.format, tuple(packed.shape)
    if not isinstance(fmt, type):
        raise SnugError(f"Tensor {name!r} is in {fmt.name}, which GGUF does not have; decode it first.")
    if len(shape) <= MAX_DIMS and shape[-1] % fmt.block_size == 0:
        return PlannedTensor(name, fmt, shape, None)
    weights = math.prod(shape)
    width = FOLD_WIDTH if weights % FOLD_WIDTH == 0 else fmt.block_size
    return PlannedTensor(name, fmt, (weights // width, width), shape)


def _check_name(name: str) -> None:
    length = len(name.encode())
    if length > MAX_NAME:
        raise SnugError(
            f"Tensor name {name!r} has {length} bytes, but ggml allows at most {MAX_NAME}; "
            f"write the model with its original, shorter names."
        )


def stored_shape(shape: tuple[int, ...], rules: PrecisionRules) -> tuple[int, ...]:
    """The shape that a weight has in a GGUF file: folded where its rows would be no whole blocks, of at most 4 dims."""
    numel = math.prod(shape)
    can_fold = numel >= MIN_FOLDED and numel % FOLD_WIDTH == 0
    if rules.fold_rows and can_fold and len(shape) > 1 and shape[-1] % FOLD_WIDTH:
        return (numel // FOLD_WIDTH, FOLD_WIDTH)
    if len(shape) > MAX_DIMS:
        leading = len(shape) - MAX_DIMS + 1
        return (math.prod(shape[:leading]), *shape[leading:])
    return shape or (1,)


def _choose_format(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, fmt: type[Format] | None, rules: PrecisionRules
) -> type[Format]:
    """fmt: what a matrix gets; None when it has no format for rows of this length."""
    if len(shape) <= 1 or math.prod(shape) <= MAX_SMALL or rules.is_full(name):
        return FORMATS["F32"]
    if fmt is not None and fmt.dtype is not None:
        return fmt
    if fmt is not None and len(shape) == 2 and not rules.is_half(name) and shape[-1] % fmt.block_size == 0:
        return fmt
    # bfloat16 weights may lie outside float16's range, so they keep their type at the same size.
    return FORMATS["BF16" if dtype == torch.bfloat16 else "F16"]
