"""The weights of a MODEL or CLIP as named tensors for a file: packed ones as they are, LoRAs merged where wished.

Nothing is decoded or copied before it is asked for, and nothing is kept afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.lora
import comfy.utils
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...quant_backends.core.errors import SnugError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.kernels.requantize import can_requantize, requantize
from .core_float8 import FLOAT8, is_plain_float8, packed_float8
from .layout import is_packed, moved, packed_tensor

MERGE, LEAVE_OUT, REFUSE = "merge", "leave out", "refuse"
LORA_CHOICES = (MERGE, LEAVE_OUT, REFUSE)
CPU = torch.device("cpu")


class ModelTensors(Mapping[str, "PackedTensor | torch.Tensor"]):
    """Tensors of the network at `prefix` in the model of an unloaded patcher, by their names in it.

    Packed weights come as they are, others in 16 bits where that is what they hold. merge: whether the patches of the
    patcher are in them; packed weights are then decoded, patched and packed again in their format.
    Raises SnugError for layers in quantized formats that only ComfyUI knows, and, with merge, for formats that Snug
    does not write.
    """

    def __init__(self, patcher: Any, prefix: str, merge: bool) -> None:
        self._model = patcher.model
        self._prefix = prefix
        self._patches = patcher.patches if merge else {}
        network = comfy.utils.get_attr(self._model, prefix.rstrip(".")) if prefix else self._model
        self._network = network
        _refuse_core_formats(network)
        self._names = list(network.state_dict())
        formats = {
            packed.format.name
            for name in self._names
            if self._patches.get(prefix + name)
            and (packed := self._packed(name)) is not None
            and not can_requantize(packed)
        }
        if formats:
            raise SnugError(
                f"A LoRA cannot be merged into weights in {' and '.join(sorted(formats))}, which Snug reads but does "
                f"not write; set lora to '{LEAVE_OUT}', or quantize the model again with Quantize Model (Snug)."
            )

    def __getitem__(self, name: str) -> PackedTensor | torch.Tensor:
        patches = self._patches.get(self._prefix + name)
        packed = self._packed(name)
        if packed is not None:
            packed = moved(packed, CPU)
            return (
                packed if not patches else requantize(self._merged(name, dequantize_packed(packed)), packed)
            )
        value = comfy.utils.get_attr(self._network, name).detach().to(CPU)
        dtype = stored_dtype(value)
        return (self._merged(name, value.float()) if patches else value).to(dtype).contiguous()

    def format_of(self, name: str) -> str | None:
        """The name of the quantized format that a weight is in; None for plain ones."""
        packed = self._packed(name)
        if packed is None or (isinstance(packed.format, type) and packed.format.dtype is not None):
            return None
        return packed.format.name

    def nbytes_of(self, name: str) -> int:
        """What a tensor takes at most, without making it."""
        packed = self._packed(name)
        return comfy.utils.get_attr(self._network, name).nbytes if packed is None else packed.nbytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def _packed(self, name: str) -> PackedTensor | None:
        module, _, attribute = name.rpartition(".")
        layer = self._network.get_submodule(module)
        weight = getattr(layer, attribute)
        if is_packed(weight):
            return packed_tensor(weight)
        return packed_float8(layer) if attribute == "weight" and is_plain_float8(layer) else None

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        key = self._prefix + name
        patched = weight.clone()
        return comfy.lora.calculate_weight(self._patches[key], patched, key, intermediate_dtype=torch.float32)


def stored_dtype(value: torch.Tensor) -> torch.dtype:
    """The smallest plain dtype that holds the values exactly: ComfyUI keeps 16-bit weights in float32 on a CPU."""
    if value.dtype not in (torch.float32, torch.float64) or value.dim() < 2:
        return value.dtype
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(value.to(dtype).to(value.dtype), value):
            return dtype
    return value.dtype


def _refuse_core_formats(network: torch.nn.Module) -> None:
    count = sum(_is_core_quantized(module) for module in network.modules())
    if count:
        raise SnugError(
            f"{count} layers are in a quantized format of ComfyUI's own; put Quantize Model (Snug) with 'requantize' "
            f"on before this node, or save with ComfyUI's own node."
        )


def _is_core_quantized(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or is_packed(weight):
        return False
    if isinstance(weight, QuantizedTensor) or type(weight).__name__ == "QuantizedTensor":
        return True
    return weight.dtype in FLOAT8 and not is_plain_float8(module)
