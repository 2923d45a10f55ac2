"""What users choose to quantize to. Names are stored in workflows and never change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats import FORMATS, Format
from ..formats.scaled import ScaledFormat, format_called
from ..kernels.dequantize import quantize_packed
from ..writers.mixes import MIXES, Mix, mixed_format
from .layers import LayerInfo

AnyFormat: TypeAlias = "type[Format] | ScaledFormat"
# (layer, its block's place, number of blocks) -> the format of its weight; None keeps the layer as it is.
Choose: TypeAlias = Callable[[LayerInfo, int, int], "AnyFormat | None"]
# (weight, its format, mean square of each input channel or None) -> the packed weight, where the weight is.
Encode: TypeAlias = Callable[[torch.Tensor, "AnyFormat", "torch.Tensor | None"], PackedTensor]


def encode_plainly(
    values: torch.Tensor, fmt: AnyFormat, importance: torch.Tensor | None = None
) -> PackedTensor:
    """Snug's own encoding of the format."""
    return quantize_packed(values, fmt, importance)


@dataclass(frozen=True, slots=True)
class Target:
    """One choice of a menu.

    name: what users choose and what workflows store. backend: key of `core.backend.BACKENDS`.
    choose: which format a layer gets; encode: how a weight is put into it, in the library's own numbers where it is
    named after a library. bits: per weight, of most layers, scales included.
    unavailable: why it cannot be chosen here and what to take instead, in one sentence; empty when it can.
    """

    name: str
    backend: str
    choose: Choose
    bits: float
    encode: Encode = encode_plainly
    unavailable: str = ""

    def format_for(self, layer: LayerInfo, block: int = 0, blocks: int = 1) -> AnyFormat | None:
        """The format of a layer's weight; None: it stays as it is, as it does not fit.

        block, blocks: as `block_positions` gives them. Raises SnugError for a target that is not available.
        """
        if self.unavailable:
            raise SnugError(self.unavailable)
        return self.choose(layer, block, blocks)


def one_format(fmt: AnyFormat) -> Choose:
    """The same format for every layer whose rows are whole blocks of it."""

    def choose(layer: LayerInfo, block: int, blocks: int) -> AnyFormat | None:
        if isinstance(fmt, type) and (not layer.shape or layer.shape[-1] % fmt.block_size):
            return None
        return fmt

    return choose


def mixed(mix: Mix) -> Choose:
    """What the mix gives each layer."""

    def choose(layer: LayerInfo, block: int, blocks: int) -> AnyFormat | None:
        return mixed_format(mix, layer.name, layer.shape, block, blocks)

    return choose


def _gguf() -> list[Target]:
    # Largest first, as `registry.gguf_types` shows them, a type's mixes before it; F32 makes nothing smaller.
    writable = [fmt for fmt in FORMATS.values() if fmt.can_quantize and fmt.name != "F32"]
    ordered = sorted(writable, key=lambda fmt: -fmt.block_bytes / fmt.block_size)
    found = []
    for fmt in ordered:
        bits = fmt.block_bytes * 8 / fmt.block_size
        choices = {f"GGUF {mix.name}": mixed(mix) for mix in MIXES.values() if mix.base == fmt.name}
        choices = dict(sorted(choices.items(), key=lambda choice: "LMS".find(choice[0][-1])))
        choices.setdefault(f"GGUF {fmt.name}", one_format(fmt))
        found += [Target(name, "gguf", choose, bits) for name, choose in choices.items()]
    return found


def _float8() -> list[Target]:
    return [
        Target(f"FP8 {kind} per row", "fp8", one_format(format_called(f"float8_{kind}-rows")), 8.0)
        for kind in ("e4m3fn", "e5m2")
    ]


_TARGETS: dict[str, Target] = {target.name: target for target in (*_gguf(), *_float8())}


def targets() -> Mapping[str, Target]:
    """Every target by its name, in the order of menus; those that are not available say why."""
    return dict(_TARGETS)


def find_target(name: str) -> Target:
    """The target called `name`; SnugError, listing those that there are, when there is none or it is unavailable."""
    found = _TARGETS.get(name)
    if found is None:
        known = ", ".join(target.name for target in _TARGETS.values() if not target.unavailable)
        raise SnugError(f"There is no quantization called {name!r}; choose one of {known}.")
    if found.unavailable:
        raise SnugError(found.unavailable)
    return found
