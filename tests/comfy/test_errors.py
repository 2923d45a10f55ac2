"""Bad files in the real server: one sentence in the error panel's text, and the server goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy_server import ComfyServer, WorkflowError
from safetensors.torch import save_file
from twins import Twins
from workflows import build_workflow

pytestmark = pytest.mark.comfy


def error_of(server: ComfyServer, file: Path) -> str:
    with pytest.raises(WorkflowError) as caught:
        server.run(build_workflow("sd3", "snug", file.name))
    assert caught.value.node_type == "SnugLoadDiffusionModel"
    message = str(caught.value)
    assert "\n" not in message and file.name in message
    return message


def test_bad_files_name_the_problem_and_the_way_out(
    twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    good = twins("sd3", "Q4_0").gguf
    data = good.read_bytes()
    bad = good.with_name("bad.gguf")
    files = {
        b"this is no model" * 4: "expected b'GGUF'",
        data[: len(data) // 2]: "truncated|cut off|ends",
        data[:8] + b"\xff" * 8 + data[16:]: "count|tensors",
        b"": "empty",
    }
    for content, expected in files.items():
        bad.write_bytes(content)
        assert re.search(expected, error_of(comfy_server, bad))
    bad.unlink()
    assert comfy_server.run(build_workflow("sd3", "snug", good.name, steps=1))["save"]


def test_a_text_encoder_is_recognised(comfy_server: ComfyServer) -> None:
    import gguf

    path = comfy_server.base / "models" / "diffusion_models" / "encoder.gguf"
    path.parent.mkdir(exist_ok=True, parents=True)
    writer = gguf.GGUFWriter(path, "t5")
    for name in ("token_embd.weight", "enc.blk.0.attn_q.weight", "enc.blk.0.ffn_up.weight"):
        writer.add_tensor(name, torch.zeros(32, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = error_of(comfy_server, path)
    assert "text encoder" in message and "text_encoders" in message
    path.unlink()


def test_a_safetensors_file_of_something_else_is_refused(comfy_server: ComfyServer) -> None:
    path = comfy_server.base / "models" / "diffusion_models" / "odd.safetensors"
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file({"a.weight": torch.zeros(4, 4)}, path)
    assert "cannot load this file as a diffusion model" in error_of(comfy_server, path)
    path.write_bytes(path.read_bytes()[:20])
    assert "complete" in error_of(comfy_server, path)
    path.unlink()
