"""How the pack behaves as a guest: nothing of ComfyUI is changed, nothing starts on import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import asyncio, json, sys, threading
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, {comfyui!r})
sys.path.insert(1, {scripts!r})
import comfy.options
comfy.options.enable_args_parsing()
import utils.install_util  # before nodes, which puts ComfyUI's folder comfy/ with its utils.py in front
import comfy.sd, comfy.ldm.flux.layers, folder_paths, nodes, server
from comfy_api.latest import ComfyExtension, io

def attributes():
    return {{
        (name, key): id(value)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("comfy", "folder_paths", "nodes", "server", "execution", "comfy_execution")
        for key, value in [*vars(module).items(), *class_attributes(module)]
        if not key.startswith("__")
    }}

def class_attributes(module):
    for class_name, cls in list(vars(module).items()):
        if isinstance(cls, type):
            for key, value in list(vars(cls).items()):
                if not key.startswith("_abc"):
                    yield f"{{class_name}}.{{key}}", value

import comfy.weight_adapter, comfy_kitchen.tensor, torch
before, threads, modules = attributes(), threading.active_count(), set(sys.modules)
import logging
level = (logging.getLogger().level, len(logging.getLogger().handlers))
from snug_path import register_snug
snug = register_snug()
extension = asyncio.run(snug.comfy_entrypoint())
found = asyncio.run(extension.get_node_list())
for node in found:
    node.GET_SCHEMA()
after = attributes()
print(json.dumps({{
    "changed": [".".join(key) for key, value in before.items() if after.get(key) != value],
    "threads": threading.active_count() - threads,
    "logging": level == (logging.getLogger().level, len(logging.getLogger().handlers)),
    "nodes_is_comfyui": nodes.__file__.startswith({comfyui!r}) and hasattr(nodes, "KSampler"),
    "libraries": sorted({{name.partition(".")[0] for name in set(sys.modules) - modules}} & {{
        "accelerate", "bitsandbytes", "diffusers", "gguf", "libgguf", "lpips", "matplotlib", "optimum", "pandas",
        "scipy", "skimage", "sklearn", "torchao", "transformers", "triton"}}),
}}))
"""


@pytest.fixture(scope="module")
def report(comfyui_path: Path, root: Path) -> dict:
    script = SCRIPT.format(comfyui=str(comfyui_path), scripts=str(root / "scripts"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=comfyui_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.comfy
def test_import_leaves_comfyui_as_it_was(report: dict) -> None:
    assert report["changed"] == []
    assert report["threads"] == 0
    assert report["logging"]


@pytest.mark.comfy
def test_comfyui_keeps_its_own_nodes_module(report: dict) -> None:
    assert report["nodes_is_comfyui"]


@pytest.mark.comfy
def test_neither_optional_nor_large_libraries_are_imported(report: dict) -> None:
    assert report["libraries"] == []
