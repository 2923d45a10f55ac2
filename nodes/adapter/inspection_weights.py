"""The weights of a MODEL or CLIP in memory, as summaries count them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...quant_backends.formats import FORMATS
from ...quant_backends.inspection.stored import StoredWeight, plain
from .layout import is_packed
from .offload_units import Place


def weights_of(network: torch.nn.Module) -> Iterator[StoredWeight]:
    """Every parameter and stored buffer once, by its name in the network."""
    for name, parameter in network.named_parameters():
        shape = tuple(parameter.shape)
        if not isinstance(parameter, QuantizedTensor):
            yield plain(name, parameter.dtype, shape)
            continue
        weight: Any = parameter
        nbytes = sum(tensor.nbytes for tensor in Place(network, name, parameter).tensors)
        format = weight.params.format if is_packed(weight) else f"{weight._layout_cls} (ComfyUI)"
        # Plain 16-bit weights are packed where the model calculates in more.
        known = FORMATS.get(format)
        yield StoredWeight(name, format, shape, weight.numel(), nbytes, known.dtype if known else None)
    stored = network.state_dict().keys()
    for name, buffer in network.named_buffers():
        if name in stored:  # others are calculated, such as position tables
            yield plain(name, buffer.dtype, tuple(buffer.shape))
