"""Lets ComfyUI in this process take tiny models whose head count it takes for granted elsewhere: Flux and others."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

# The server that the tests start loads the same as a custom node.
_PATCH = Path(__file__).parents[1] / "comfy/custom_nodes/snug_test_nodes/narrow_models.py"


def accept_narrow_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test, or whatever `monkeypatch` belongs to, is over."""
    detection = importlib.import_module("comfy.model_detection")
    # Replaced by itself now, it is put back afterwards.
    monkeypatch.setattr(detection, "detect_unet_config", detection.detect_unet_config)
    spec = importlib.util.spec_from_file_location("narrow_models", _PATCH)
    assert spec is not None and spec.loader is not None
    narrow_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(narrow_models)
    narrow_models.accept_narrow_models()
