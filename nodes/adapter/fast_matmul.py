"""Fast matmul of a MODEL: which layers multiply in 8 bits, as a setting of one clone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...quant_backends.core.device import faster_product
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.formats import FORMATS
from ...quant_backends.kernels.eight_bit import PRODUCTS
from ...quant_backends.kernels.fast_matmul import FLOAT8, INT8
from ...quant_backends.memory.layerwise import DEFAULT, SkipRules, parse_skip_patterns
from ...quant_backends.quantization.calibration import Calibration
from ...quant_backends.quantization.fast_layers import reason_to_leave_out
from .compilation import repeated_blocks
from .conversion import NETWORK
from .core_float8 import is_plain_float8, packed_float8
from .fast_calls import set_fast_calls
from .fast_matmul_report import fast_matmul_report
from .layout import is_packed, packed_tensor
from .lora_settings import lora_settings, set_lora_settings
from .operations import PackedLinear
from .reweight import replaceable_layers, reweight

AUTO, OFF = "auto", "off"
_STORED = {"int8": INT8, "fp8": FLOAT8}
MODES = (AUTO, *_STORED, OFF)
# Plain numbers as formats: such a weight is packed as it is.
_PLAIN = {fmt.dtype: fmt for fmt in (FORMATS[name] for name in ("F32", "F16", "BF16"))}


@dataclass
class Selection:
    """layers: of the model, by name in the network, that multiply in 8 bits; left: how many others, by the reason."""

    layers: dict[str, PackedLinear] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)


def set_fast_matmul(
    patcher: Any, mode: str, leave_out: str, keep: bool, calibration: Calibration | None = None
) -> tuple[Any, str]:
    """(a MODEL whose large layers multiply in 8 bits, report). The given one stays as it is.

    mode: of MODES; leave_out: layers that multiply as they are, as `parse_skip_patterns` takes them; keep: whether
    rounded weights are kept where memory is free. calibration: what the layers' error is measured with.
    Raises SnugError for a pattern that is none, and when the user cancels, what ComfyUI raises then.
    """
    device = patcher.load_device
    stored = faster_product(device) if mode == AUTO else _STORED.get(mode)
    if stored is None:
        clone = patcher.clone()
        set_fast_calls(clone, stored="", layers=frozenset())
        _keep_lora_beside(clone, frozenset())
        return clone, _off_report(mode, device)
    network = patcher.model.diffusion_model
    names = [name.removesuffix(".weight") for name, _ in network.named_parameters()]
    rules = parse_skip_patterns(leave_out, names)
    by_default = DEFAULT in (part.strip() for part in leave_out.split(","))
    new = _with_packed_layers(patcher, rules, by_default)
    selection = select(new.model, rules, by_default)
    layers = frozenset(NETWORK + name for name in selection.layers)
    set_fast_calls(new, stored=stored, layers=layers, keep=keep)
    _keep_lora_beside(new, layers)
    return new, fast_matmul_report(new, selection.layers, selection.left, stored, calibration)


def _keep_lora_beside(patcher: Any, layers: frozenset[str]) -> None:
    """A LoRA that is merged would keep its layers from it, or be rounded to 8 bits."""
    weights = frozenset(f"{name}.weight" for name in layers)
    set_lora_settings(patcher, replace(lora_settings(patcher), beside=weights))


def select(model: Any, rules: SkipRules, by_default: bool) -> Selection:
    """The layers of a model's repeated blocks that gain from it. by_default: leave out those that do not, by name."""
    found = Selection()
    for name, layer in _block_layers(model):
        reason = rules.reason(name) or (reason_to_leave_out(name) if by_default else None)
        if reason is not None:
            found.left[reason] += 1
        elif not isinstance(layer, PackedLinear) or not is_packed(layer.weight):
            found.left["in a format of ComfyUI's own"] += 1
        elif isinstance(packed_tensor(layer.weight).format, PRODUCTS):
            found.left["multiplying in 8 bits already"] += 1
        else:
            found.layers[name] = layer
    return found


def _block_layers(model: Any) -> list[tuple[str, Any]]:
    """(name in the network, layer) of the linear layers in the repeated blocks."""
    blocks = tuple(f"{NETWORK}{name}." for name in repeated_blocks(model.diffusion_model))
    return [
        (name.removeprefix(NETWORK), layer)
        for name, layer in replaceable_layers(model)
        if name.startswith(blocks) and isinstance(layer, torch.nn.Linear)
    ]


def _with_packed_layers(patcher: Any, rules: SkipRules, by_default: bool) -> Any:
    """A clone; of a model with plain weights a copy in which the layers hold theirs packed, sharing the bytes.

    So a LoRA stays beside the weight, where ComfyUI would merge it.
    """
    plain = {
        NETWORK + name
        for name, layer in _block_layers(patcher.model)
        if _packed_plain(layer) is not None
        and rules.reason(name) is None
        and not (by_default and reason_to_leave_out(name))
    }
    if not plain:
        return patcher.clone()
    return reweight(patcher, lambda name, layer: _packed_plain(layer) if name in plain else None)


def _packed_plain(layer: Any) -> PackedTensor | None:
    """A weight of plain numbers as a packed one; None for others."""
    weight = layer.weight
    if is_plain_float8(layer):
        return packed_float8(layer)
    if type(weight) is not torch.nn.Parameter or weight.dtype not in _PLAIN or not weight.is_contiguous():
        return None
    return PackedTensor(weight.detach().view(-1).view(torch.uint8), _PLAIN[weight.dtype], tuple(weight.shape))


def _off_report(mode: str, device: torch.device) -> str:
    if mode == OFF:
        return "fast matmul: off; every layer multiplies exactly"
    return (
        f"fast matmul: off, as this device ({device}) does not multiply 8-bit numbers faster; choose int8 or fp8 to "
        f"have the same results as on one that does"
    )
