"""Workflows made with other packs' loaders, which are not installed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from comfy_server import ComfyServer
from twins import Twins
from workflows import build_workflow, saved_latent

pytestmark = pytest.mark.comfy


@pytest.fixture
def replacements(comfy_server: ComfyServer) -> dict[str, list[dict[str, Any]]]:
    """Of Snug's nodes, by the node that is replaced."""
    if not comfy_server.json("/features").get("node_replacements"):
        pytest.skip("this ComfyUI has no node replacement")
    found = comfy_server.json("/node_replacements")
    ours = {
        old: [new for new in entries if new["new_node_id"].startswith("Snug")]
        for old, entries in found.items()
    }
    return {old: entries for old, entries in ours.items() if entries}


def test_each_fits_the_new_node(
    replacements: dict[str, list[dict[str, Any]]], comfy_server: ComfyServer
) -> None:
    """Inputs exist, what is required is given, and fixed values are choices that there are."""
    info = comfy_server.object_info()
    assert {"UnetLoaderGGUF", "DualCLIPLoaderGGUF", "CheckpointLoaderNF4"} <= set(replacements)
    for old, (entry,) in replacements.items():
        assert old not in info
        inputs = info[entry["new_node_id"]]["input"]
        known = {**inputs["required"], **inputs.get("optional", {})}
        mapped = {mapping["new_id"]: mapping for mapping in entry["input_mapping"]}
        assert set(inputs["required"]) <= set(mapped) <= set(known), old
        for name, mapping in mapped.items():
            if "set_value" in mapping:
                assert mapping["set_value"] in known[name][1]["options"], (old, name)
            else:
                assert mapping["old_id"] in entry["old_widget_ids"], (old, name)


def test_a_workflow_in_api_format_runs_as_if_it_were_snugs(
    replacements: dict[str, list[dict[str, Any]]],
    comfy_server: ComfyServer,
    twins: Callable[[str, str], Twins],
) -> None:
    file = twins("sd3", "Q4_0").gguf.name
    ours = build_workflow("sd3", "snug", file, steps=2)
    theirs = {
        **ours,
        "model": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": file}, "_meta": {"title": "Unet"}},
    }
    expected = saved_latent(comfy_server, comfy_server.run(ours))
    comfy_server.free()
    theirs["save"] = {**theirs["save"], "inputs": {**theirs["save"]["inputs"], "filename_prefix": "replaced"}}
    assert saved_latent(comfy_server, comfy_server.run(theirs)).equal(expected)
