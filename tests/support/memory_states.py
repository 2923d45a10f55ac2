"""How much of a model ComfyUI has loaded: every state that a workflow can meet."""

from __future__ import annotations

from typing import Any


def load_whole(patcher: Any) -> None:
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])


def load_nothing(patcher: Any) -> None:
    """ComfyUI's low-VRAM state: every layer is offloaded and cast as it is used."""
    patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
    assert patcher.model.model_lowvram


def load_half(patcher: Any) -> None:
    patcher.patch_model(patcher.load_device, lowvram_model_memory=patcher.model_size() // 2)


def load_whole_then_offload(patcher: Any) -> None:
    load_whole(patcher)
    patcher.partially_unload(patcher.offload_device, patcher.model_size() // 2)
    assert patcher.model.model_lowvram


LOADS = [load_whole, load_nothing, load_half, load_whole_then_offload]
