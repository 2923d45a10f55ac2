"""Group offloading to devices that exist in time only: their memory is poison until a copy has been waited for."""

from __future__ import annotations

from typing import Any

import pytest
from snug.quant_backends.memory.simulated import SimulatedDevice, SimulatedTransfer

Transfers = list[SimulatedTransfer]


def simulate_transfers(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    """From here on models on the CPU are streamed; returns a list of the transfers that are made."""
    made: Transfers = []

    def transfer_to(*_: Any) -> SimulatedTransfer:
        made.append(SimulatedTransfer(SimulatedDevice()))
        return made[-1]

    monkeypatch.setattr("snug.nodes.adapter.offloading.transfer_to", transfer_to)
    return made
