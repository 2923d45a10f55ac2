"""Weights put under one another, and cut into rows: what reference models fuse (q, k and v) and diffusers splits.

Packed weights stay packed where their packing allows it (packed_rows). Elsewhere they are decoded, chunk by chunk, into
a dense tensor of the narrowest dtype that adds no error worth mentioning to the format's own:

- the 16-bit dtype that all parts carry, plain or in their scales: their library rounds what it decodes to it as well;
- where no part says any, float16: its rounding (2^-12 of a weight) is a sixteenth of an 8-bit code's, as long as the
  weights lie well inside its range;
- where they do not, or parts disagree, or one is plain float32: float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.errors import SnugError
from ..core.host_memory import empty
from ..core.packed import PackedTensor
from ..kernels.dequantize import dequantize_packed
from .packed_rows import cat_rows, cut_packed, join_packed, joined_shape

Value = PackedTensor | torch.Tensor

# Largest magnitudes of a tensor that float16 holds with its full precision, with room for weights 2^4 times smaller.
FLOAT16_RANGE = (2**-10, 65504)


def join_rows(parts: Sequence[Value]) -> Value:
    """The parts under one another, along dimension 0; the same object when there is only one.

    Packed parts stay packed if they can (see above). Decoded, the result equals the decoded parts under one another
    bit for bit, in its dtype when it is dense. Raises SnugError when the other dimensions differ.
    """
    first = parts[0]
    if any(len(part.shape) == 0 or part.shape[1:] != first.shape[1:] for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise SnugError(f"Tensors of the shapes {shapes} cannot be joined by rows: their columns differ.")
    if len(parts) == 1:
        return first
    packed = [part for part in parts if isinstance(part, PackedTensor)]
    plain = [part for part in parts if isinstance(part, torch.Tensor)]
    if not packed and len({part.dtype for part in plain}) == 1:
        return cat_rows(plain)
    joined = None if plain else join_packed(packed)
    return _decode(parts) if joined is None else joined


def rows(value: Value, start: int, stop: int) -> Value:
    """The rows start..stop of a weight; a view where that is possible, dense where a block crosses the cut."""
    if isinstance(value, torch.Tensor):
        return value[start:stop]
    found = cut_packed(value, start, stop)
    return _decode([value])[start:stop] if found is None else found


def swap_halves(value: Value) -> Value:
    """The second half of the rows above the first: scale and shift in the other order.

    Raises SnugError when the number of rows is odd.
    """
    count = value.shape[0] if len(value.shape) else 1
    if count % 2:
        raise SnugError(f"A tensor of the shape {tuple(value.shape)} does not have two halves of rows.")
    upper, lower = rows(value, 0, count // 2), rows(value, count // 2, count)
    return join_rows((lower, upper))


def _decode(parts: Sequence[Value]) -> torch.Tensor:
    dtype = _dense_dtype(parts)
    joined = _decode_as(parts, dtype)
    if dtype != torch.float16 or _fits_float16(parts, joined):
        return joined
    return _decode_as(parts, torch.float32)


def _decode_as(parts: Sequence[Value], dtype: torch.dtype) -> torch.Tensor:
    first = parts[0]
    device = first.device if isinstance(first, torch.Tensor) else first.data.device
    joined = empty(joined_shape(parts), dtype, device)
    for part, place in zip(parts, _places(parts, joined), strict=True):
        if isinstance(part, torch.Tensor):
            place.copy_(part)
        else:
            dequantize_packed(part, dtype, out=place)
    return joined


def _places(parts: Sequence[Value], joined: torch.Tensor) -> Sequence[torch.Tensor]:
    return joined.split([part.shape[0] for part in parts])


def _dense_dtype(parts: Sequence[Value]) -> torch.dtype:
    dtypes = {dtype for part in parts if (dtype := _own_dtype(part)) is not None}
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise SnugError("Tensors of whole numbers cannot be joined with weights.")
    return torch.float16 if not dtypes else dtypes.pop() if len(dtypes) == 1 else torch.float32


def _own_dtype(part: Value) -> torch.dtype | None:
    """The precision that a part asks for; None for one whose numbers any 16-bit dtype holds well enough."""
    if isinstance(part, torch.Tensor):
        return part.dtype if part.dtype.itemsize > 1 or not part.dtype.is_floating_point else None
    if isinstance(part.format, type):
        return part.format.dtype
    scale = part.parts.get("scale", part.parts.get("absmax"))
    return scale.dtype if scale is not None and scale.dtype in (torch.bfloat16, torch.float16) else None


def _fits_float16(parts: Sequence[Value], joined: torch.Tensor) -> bool:
    smallest, largest = FLOAT16_RANGE
    for part, place in zip(parts, _places(parts, joined), strict=True):
        if isinstance(part, PackedTensor) and place.numel():
            magnitude = max(abs(value.item()) for value in torch.aminmax(place))
            if not (magnitude == 0 or smallest <= magnitude <= largest):
                return False
    return True
