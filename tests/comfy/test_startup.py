"""ComfyUI starts with the pack in it and answers."""

from __future__ import annotations

import pytest
from comfy_server import ComfyServer, WorkflowError

pytestmark = pytest.mark.comfy


def test_server_answers(comfy_server: ComfyServer) -> None:
    assert comfy_server.system_stats()["system"]["comfyui_version"]


def test_comfyuis_nodes_module_is_not_shadowed(comfy_server: ComfyServer) -> None:
    assert "KSampler" in comfy_server.object_info()


def test_refused_workflow_names_the_node(comfy_server: ComfyServer) -> None:
    workflow = {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 5], "filename_prefix": "x"}},
    }
    with pytest.raises(WorkflowError) as caught:
        comfy_server.run(workflow)
    assert caught.value.node_type in ("SaveLatent", None)
