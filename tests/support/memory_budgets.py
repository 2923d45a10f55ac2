"""Memory budgets in bytes for tiny models, on a simulated GPU that has more memory than they say."""

from __future__ import annotations

from typing import Any

import pytest
from simulated_gpu import SimulatedGPU
from simulated_transfers import simulate_transfers

MEGABYTE = 1 << 20
GIGABYTE = 1 << 30
RESERVE = MEGABYTE
# More than ComfyUI's estimate for any tiny model at 64 pixels.
LEAST_FREE = 32 * MEGABYTE


def roomy_gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGPU:
    """Large enough for everything; weights are streamed to a device that exists in time only."""
    simulate_transfers(monkeypatch)
    return SimulatedGPU(monkeypatch, 16 * GIGABYTE, RESERVE, LEAST_FREE)


def apply(budget: float, model: Any, latent: Any = None, size: int = 64, **others: Any) -> tuple[Any, str]:
    """(models within the budget, report). budget: in bytes; size: pixels per side; others: clip, vae, control_net."""
    from snug.nodes.adapter.memory_budget import ImageSize, Models, apply_budget

    return apply_budget(budget / GIGABYTE, Models(model, **others), ImageSize(size, size, 1), latent)
