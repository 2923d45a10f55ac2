"""Makes ComfyUI, in this process, take models that are narrower than the published ones, as the tests' node does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_NODE = Path(__file__).resolve().parents[1] / "tests/comfy/custom_nodes/snug_test_nodes/narrow_models.py"


def accept_narrow_models() -> None:
    spec = importlib.util.spec_from_file_location("narrow_models", _NODE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.accept_narrow_models()
