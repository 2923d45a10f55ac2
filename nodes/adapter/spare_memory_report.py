"""Spare memory for the copies of a MODEL's weights, as a setting of one clone, and what to expect of it."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management

from ...quant_backends.memory.budget import GIGABYTE
from ...quant_backends.memory.plan import size_text
from .fast_calls import fast_call_settings, rounding_layers, set_fast_calls
from .lora_mode import with_packed_float8
from .memory_budget_patcher import BudgetedPatcher
from .spare_memory import SpareSettings, possible_copies


def set_spare_memory(patcher: Any, limit_gb: float) -> tuple[Any, str]:
    """(a MODEL that keeps copies of its weights, report). The given one stays as it is.

    limit_gb: what copies may take at most, 0 for what is free.
    """
    new = with_packed_float8(patcher)
    settings = SpareSettings(int(limit_gb * GIGABYTE) or None)
    set_fast_calls(new, spare=settings)
    return new, _report(new, settings)


def _report(patcher: Any, settings: SpareSettings) -> str:
    if isinstance(patcher, BudgetedPatcher):
        return "this model has a memory budget, which leaves nothing for copies: none are kept"
    layers = rounding_layers(patcher.model, fast_call_settings(patcher))
    count, nbytes = possible_copies(patcher.model, layers, settings)
    if not count:
        return "this model has no quantized layers that Snug decodes: there is nothing to keep"
    device = patcher.load_device
    limit = "what is free then" if settings.limit is None else f"{size_text(settings.limit)} at most"
    lines = [
        f"copies of the weights of {count} layers take {size_text(nbytes)}; kept before the first step: {limit}",
        f"free now on {device}: {size_text(int(management.get_free_memory(device)))}, of which sampling needs a part",
    ]
    if layers:
        lines.append(f"{len(layers)} of them are rounded to 8 bits for fast matmul, the others decoded")
    return "\n".join(lines)
