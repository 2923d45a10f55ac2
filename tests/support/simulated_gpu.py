"""A GPU for ComfyUI's own memory management that is not there: it has a size, and models that are loaded take of it.

Tensors stay where they are. ComfyUI tells the device apart from the CPU by its number, and decides as on a GPU without
dynamic VRAM what is loaded and what makes way.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

DEVICE = torch.device("cpu", 0)


class SimulatedGPU:
    """total: bytes of memory; reserve, least_free: what ComfyUI leaves to others, and for computing at least."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, reserve: int, least_free: int) -> None:
        self.total = total
        self._networks: dict[int, torch.nn.Module] = {}
        management = importlib.import_module("comfy.model_management")
        replacements = {
            "is_device_cpu": lambda device: device != DEVICE,
            "get_total_memory": lambda *_, **__: self.total,
            "get_free_memory": self._free,
            "extra_reserved_memory": lambda: reserve,
            "minimum_inference_memory": lambda: least_free + reserve,
            "vram_state": management.VRAMState.NORMAL_VRAM,
        }
        for name, value in replacements.items():
            monkeypatch.setattr(management, name, value)

    def holds(self, *patchers: Any) -> None:
        """From here on these models run on it."""
        for patcher in patchers:
            patcher.load_device = DEVICE
            self._networks[id(patcher.model)] = patcher.model

    @property
    def used(self) -> int:
        """Bytes of weights."""
        return sum(int(network.model_loaded_weight_memory) for network in self._networks.values())  # type: ignore[arg-type]

    def _free(self, _device: Any = None, torch_free_too: bool = False) -> Any:
        free = self.total - self.used
        return (free, 0) if torch_free_too else free
