"""The formats that the weights of a model are in."""

from __future__ import annotations

from collections import Counter

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .layout import is_packed, stored_nbytes

# A format is named when it makes up this part of a model's bytes.
NAMED_SHARE = 0.05


def main_formats(model: torch.nn.Module) -> list[str]:
    """Those that most bytes are in, the largest part first."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        if is_packed(parameter):
            counts[parameter.params.format] += stored_nbytes(parameter)
        elif isinstance(parameter, QuantizedTensor):
            counts[parameter._layout_cls] += parameter._qdata.nbytes
        else:
            counts[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    return [name for name, nbytes in counts.most_common() if nbytes >= NAMED_SHARE * counts.total()]
