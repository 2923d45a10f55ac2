"""Lets ComfyUI in this process take the tiny Flux, whose head count it takes for granted elsewhere."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


def accept_narrow_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    detection = importlib.import_module("comfy.model_detection")
    original = detection.detect_unet_config

    def detect(*args: Any, **options: Any) -> Any:
        config = original(*args, **options)
        if config and config.get("image_model") == "flux":
            config["num_heads"] = config["hidden_size"] // 128
        return config

    monkeypatch.setattr(detection, "detect_unet_config", detect)
