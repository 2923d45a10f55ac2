"""Filling memory that nobody needs with copies of a model's weights, and how much of it there is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch

from ...quant_backends.kernels.dequantize import dequantize_packed
from ...quant_backends.kernels.eight_bit import PRODUCTS
from ...quant_backends.kernels.fast_matmul import round_weight, rounded_already
from ...quant_backends.memory.plan import size_text
from ...quant_backends.memory.spare import MERGING, ROUNDING, Candidate, choose, decoding_cost
from .compat import is_dynamic
from .layout import moved, packed_tensor
from .memory_budget_patcher import BudgetedPatcher
from .offload_units import is_streamed
from .operations import PackedConv, PackedLinear
from .packed_module import PackedWeightModule, packed_modules
from .weight_copies import Copies, WeightCopy, copies_of

logger = logging.getLogger("snug")

# Of the whole memory, what stays free for others where the user gives no limit.
_RESERVE = 0.1


@dataclass(frozen=True)
class SpareSettings:
    """limit: bytes that copies may take at most, None for what is free; dense: also decoded ones, not only rounded."""

    limit: int | None = None
    dense: bool = True


@dataclass(frozen=True, slots=True)
class _Wanted(Candidate):
    """A copy that would be of use. stored: of a rounded one, "" for a dense one."""

    layer: PackedWeightModule
    stored: str

    @property
    def merges(self) -> bool:
        patches = self.layer.weight_patches
        return not self.stored and patches is not None and patches.branch is None

    def is_there(self, dtype: torch.dtype, device: torch.device) -> bool:
        copy = self.layer.weight_copy
        if copy is None:
            return False
        if self.stored:
            found = copy.rounded
            return found is not None and found.stored == self.stored and found.codes.device == device
        patches = self.layer.weight_patches if self.merges else None
        dense = copy.merged(patches, dtype)
        return dense is not None and dense.device == device

    def make(self, dtype: torch.dtype, device: torch.device) -> WeightCopy:
        packed = moved(packed_tensor(self.layer.weight), device)
        if self.stored:
            return WeightCopy(rounded=round_weight(packed, self.stored, dtype))
        patches = self.layer.weight_patches
        if not self.merges or patches is None:
            return WeightCopy(dequantize_packed(packed, dtype))
        return WeightCopy(patches(dequantize_packed(packed)).to(dtype), patches=patches)


def fill(model: Any, x: torch.Tensor, rounded: Mapping[Any, str], settings: SpareSettings) -> None:
    """Keeps copies of the model's weights as far as there is memory beside computing with x, ComfyUI's latent.

    rounded: by layer, how products round its weight; the other layers' weights are kept decoded if `settings` say so.
    Looks at the layers only when something has changed. Shows progress; raises when the user cancels.
    """
    copies = copies_of(model, make=True)
    assert copies is not None
    dtype = compute_dtype(model)
    state = (
        settings,
        frozenset(rounded.values()),
        frozenset(map(id, rounded)),
        dtype,
        x.device,
        model.current_weight_patches_uuid,
    )
    if copies.state == state:
        return
    wanted = list(_wanted(model, x.device, dtype, rounded, settings))
    there = {id(entry.layer) for entry in wanted if entry.is_there(dtype, x.device)}
    for _, layer in packed_modules(model):
        if layer.weight_copy is not None and id(layer) not in there:
            copies.drop(layer)
    if settings.limit is not None:
        copies.release(copies.nbytes - settings.limit)
    missing = [entry for entry in wanted if id(entry.layer) not in there]
    room = _room(model, x, settings, copies.nbytes)
    try:
        _make(copies, choose(missing, room), dtype, x.device)
    finally:
        copies.count()
    copies.state = state
    logger.info("Copies of weights in spare memory: %s", size_text(copies.nbytes))


def _make(copies: Copies, chosen: list[_Wanted], dtype: torch.dtype, device: torch.device) -> None:
    bar = comfy.utils.ProgressBar(max(1, len(chosen)))
    for entry in chosen:
        management.throw_exception_if_processing_interrupted()
        try:
            copy = entry.make(dtype, device)
        except management.OOM_EXCEPTION:  # others have taken memory meanwhile
            management.soft_empty_cache()
            return
        copies.add(entry.layer, copy, entry.value)
        bar.update(1)


def _wanted(
    model: Any, device: torch.device, dtype: torch.dtype, rounded: Mapping[Any, str], settings: SpareSettings
) -> Iterator[_Wanted]:
    """Copies of layers that are on the device for good: others come and go as memory is short."""
    pages = _is_paged(model)
    for _, layer in packed_modules(model):
        is_there = pages or layer.weight.device == device
        if is_there and not is_streamed(layer) and not layer.changed_for_a_while():
            entry = _wanted_of(layer, dtype, rounded.get(layer, ""), settings.dense)
            if entry is not None:
                yield entry


def _wanted_of(layer: PackedWeightModule, dtype: torch.dtype, stored: str, dense: bool) -> _Wanted | None:
    """The copy that would be of use to a layer; None: it has what it needs."""
    packed = packed_tensor(layer.weight)
    fmt, weights, cost = packed.format, layer.weight.numel(), decoding_cost(packed.format)
    if stored:
        is_rounded = rounded_already(packed, stored) is not None
        return None if is_rounded else _Wanted(weights, cost + ROUNDING, layer, stored)
    if not dense or not isinstance(layer, (PackedLinear, PackedConv)) or isinstance(fmt, PRODUCTS):
        return None
    patches = layer.weight_patches
    is_merged = patches is not None and patches.branch is None
    is_kept = patches is not None and patches.kept is not None
    is_plain = isinstance(fmt, type) and fmt.dtype == dtype
    if is_kept or (is_plain and not is_merged):
        return None
    value = (cost + (MERGING if is_merged else 0)) / dtype.itemsize
    return _Wanted(weights * dtype.itemsize, value, layer, "")


def compute_dtype(model: Any) -> torch.dtype:
    """What the layers of a model calculate in."""
    return model.manual_cast_dtype or model.get_dtype()


def _is_paged(model: Any) -> bool:
    """Whether ComfyUI pages the weights, whose home is the host's memory then."""
    patcher = model.current_patcher
    return patcher is not None and is_dynamic(patcher)


def _room(model: Any, x: torch.Tensor, settings: SpareSettings, held: int) -> float:
    """Bytes for more copies, beside what computing takes by ComfyUI's own estimate."""
    patcher = model.current_patcher
    if isinstance(patcher, BudgetedPatcher):
        return 0  # planned for what the user allows, not for what is free
    free = management.get_free_memory(x.device)
    if patcher is not None and is_dynamic(patcher):
        free -= max(0, patcher.model_size() - patcher.loaded_size())  # pages that are still to come
    free -= max(model.memory_required(list(x.shape)), management.minimum_inference_memory())
    if settings.limit is not None:
        return min(settings.limit - held, free)
    return free - _RESERVE * management.get_total_memory(x.device)


def possible_copies(model: Any, rounded: Mapping[Any, str], settings: SpareSettings) -> tuple[int, int]:
    """(layers, bytes) of which copies could be kept, for a report before the model is loaded."""
    dtype = compute_dtype(model)
    entries = (
        _wanted_of(layer, dtype, rounded.get(layer, ""), settings.dense) for _, layer in packed_modules(model)
    )
    found = [entry.nbytes for entry in entries if entry is not None]
    return len(found), sum(found)
