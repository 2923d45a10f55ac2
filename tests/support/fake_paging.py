"""What comfy-aimdo needs an NVIDIA driver for, stubbed: its pages only hand out addresses."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch


class FakeHostBuffer:
    """Stands for pinned memory, which needs a GPU."""

    size = 0

    def __init__(self, *_: Any) -> None:
        pass


class FakeVBAR:
    """Stands for pages of GPU memory; only hands out addresses."""

    def __init__(self, *_: Any) -> None:
        self.size = 0

    def alloc(self, size: int) -> tuple[Any, int, int]:
        self.size += size
        return self, self.size - size, size

    def prioritize(self) -> None:
        pass

    def free_memory(self, _: int) -> int:
        return 0

    def loaded_size(self) -> int:
        return 0


def fake_paging(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelPatcherDynamic can be built and loaded; skips where ComfyUI has none."""
    model_patcher = importlib.import_module("comfy.model_patcher")
    if not hasattr(model_patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    buffers, pages = (
        importlib.import_module(f"comfy_aimdo.{name}") for name in ("host_buffer", "model_vbar")
    )
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(buffers, "HostBuffer", FakeHostBuffer)
    monkeypatch.setattr(pages, "ModelVBAR", FakeVBAR)
    monkeypatch.setattr(management, "get_free_memory", lambda *_: 8 << 30)


def load_dynamically(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on ComfyUI builds models as with dynamic VRAM, with the meta device in place of a GPU."""
    fake_paging(monkeypatch)
    model_patcher = importlib.import_module("comfy.model_patcher")
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(importlib.import_module("comfy.memory_management"), "aimdo_enabled", True)
    monkeypatch.setattr(model_patcher, "CoreModelPatcher", model_patcher.ModelPatcherDynamic)
    for name in ("get_torch_device", "text_encoder_device"):
        monkeypatch.setattr(management, name, lambda: torch.device("meta"))
