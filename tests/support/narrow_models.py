"""Lets ComfyUI in this process take tiny models whose sizes it takes for granted elsewhere: Flux and others, T5."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

# The server that the tests start loads the same as a custom node.
_PATCHES = Path(__file__).parents[1] / "comfy" / "custom_nodes" / "snug_test_nodes"


def accept_narrow_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test, or whatever `monkeypatch` belongs to, is over."""
    _keep(monkeypatch, "comfy.model_detection", "detect_unet_config")
    node_module("narrow_models").accept_narrow_models()


def accept_small_t5(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test, or whatever `monkeypatch` belongs to, is over."""
    _keep(
        monkeypatch,
        "comfy.sd",
        "detect_te_model",
        "load_text_encoder_state_dicts",
        "load_state_dict_guess_config",
    )
    node_module("small_t5").accept_small_t5()


def node_module(name: str) -> ModuleType:
    """A module of the nodes that only tests use."""
    spec = importlib.util.spec_from_file_location(name, _PATCHES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _keep(monkeypatch: pytest.MonkeyPatch, module: str, *names: str) -> None:
    """Replaced by themselves now, they are put back afterwards."""
    found = importlib.import_module(module)
    for name in names:
        monkeypatch.setattr(found, name, getattr(found, name))
