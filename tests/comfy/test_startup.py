"""ComfyUI starts with the pack in it, shows its nodes and answers as the other tests expect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_server import ComfyServer, ServerError, WorkflowError, execution_seconds

pytestmark = pytest.mark.comfy

LATENT = {
    "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "save": {"class_type": "SaveLatent", "inputs": {"samples": ["latent", 0], "filename_prefix": "startup"}},
}


def test_server_answers(comfy_server: ComfyServer) -> None:
    assert comfy_server.system_stats()["system"]["comfyui_version"]


def test_comfyuis_nodes_module_is_not_shadowed(comfy_server: ComfyServer) -> None:
    assert "KSampler" in comfy_server.object_info()


def test_node_list_names_every_node(comfy_server: ComfyServer, root: Path) -> None:
    info = comfy_server.object_info()
    found = {name for name, node in info.items() if node["python_module"].endswith("ComfyUI-Snug")}
    listed = json.loads((root / "node_list.json").read_text(encoding="utf-8"))
    assert found == set(listed)


def test_workflow_runs_and_is_timed(comfy_server: ComfyServer) -> None:
    entry = comfy_server.wait(comfy_server.queue(LATENT))
    assert entry["outputs"]["save"]["latents"]
    assert 0 <= execution_seconds(entry) < 60


def test_refused_workflow_names_the_node(comfy_server: ComfyServer) -> None:
    bad = {**LATENT["latent"], "inputs": {"width": "wide", "height": 64, "batch_size": 1}}
    with pytest.raises(WorkflowError, match=r"node latent \(EmptyLatentImage\): .*width") as caught:
        comfy_server.run({**LATENT, "latent": bad})
    assert caught.value.node_id == "latent"


def test_failing_node_is_named_with_its_error(comfy_server: ComfyServer) -> None:
    broken = {"class_type": "LoadLatent", "inputs": {"latent": "broken.latent"}}
    (comfy_server.base / "input" / "broken.latent").write_bytes(b"not a latent")
    with pytest.raises(WorkflowError, match=r"node latent \(LoadLatent\): ") as caught:
        comfy_server.run({**LATENT, "latent": broken})
    assert caught.value.node_type == "LoadLatent"


def test_second_start_is_refused(comfy_server: ComfyServer) -> None:
    with pytest.raises(ServerError, match="already running"):
        comfy_server.start()


def test_free_and_interrupt_are_accepted(comfy_server: ComfyServer) -> None:
    comfy_server.free()
    comfy_server.interrupt()
    comfy_server.run(LATENT)


def test_server_that_cannot_start_shows_its_log(
    comfyui_path: Path, tmp_path: Path, comfy_server: ComfyServer
) -> None:
    bad = ComfyServer(comfy_server.python, comfyui_path, tmp_path, {}, arguments=["--no-such-option"])
    with pytest.raises(ServerError, match=r"(?s)exit status 2.*--no-such-option"):
        bad.start()
