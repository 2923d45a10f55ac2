"""Streamed models with precision settings: where weights are changes no bit of what is calculated with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_models import predict
from memory_states import load_whole
from simulated_transfers import simulate_transfers

FUSED = {"compute_dtype": "fp32", "fuse_qkv": True}
HALF = {"compute_dtype": "bf16", "fp32_islands": True}


def precise(patcher: Any, settings: dict[str, Any]) -> Any:
    from snug.nodes.adapter.precision import PrecisionSettings, set_precision

    return set_precision(patcher, PrecisionSettings(**settings))[0]


def offloaded(patcher: Any, level: str) -> Any:
    from snug.nodes.adapter.group_offload import OffloadSettings, offload_model

    return offload_model(patcher, OffloadSettings(level=level, prefetch=1))[0]


def run(patcher: Any, family: str) -> torch.Tensor:
    load_whole(patcher)
    return predict(patcher, family).float()


@pytest.mark.parametrize("settings", [FUSED, HALF], ids=["fused", "islands"])
@pytest.mark.parametrize("level", ["block", "leaf"])
@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_precision_on_either_side_of_offloading(
    twins: Any, monkeypatch: pytest.MonkeyPatch, family: str, level: str, settings: dict[str, Any]
) -> None:
    transfers = simulate_transfers(monkeypatch)
    for patcher in twins(family, "Q8_0").load():
        plain = run(patcher, family)
        wanted = run(precise(patcher, settings), family)
        for both in (
            precise(offloaded(patcher, level), settings),
            offloaded(precise(patcher, settings), level),
        ):
            found = run(both, family)
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()
            assert any(event.kind == "copy" for event in transfers[-1].clock.events)
        assert torch.equal(run(patcher, family), plain)
