"""`snug inspect`, `compare` and `convert`, and how the program is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bootstrap import pyproject
from comfy_server import link_folder
from quantized_files import quantize_tensors
from safetensors.torch import save_file
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.readers import load_diffusion_gguf

Run = Callable[..., tuple[int, str, str]]
Tensors = dict[str, torch.Tensor]
LAYER = "blocks.0.ffn.0.weight"


def test_inspect(model: Path, snug: Run) -> None:
    code, text, _ = snug("inspect", model)
    assert code == 0 and "architecture:  wan" in text and "BF16" in text
    code, text, _ = snug("inspect", model, "--json")
    (summary,) = json.loads(text)
    assert code == 0 and summary["architecture"] == "wan"
    assert snug("inspect", model.with_name("none"))[0] == 1


def test_compare(model: Path, tensors: Tensors, snug: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    changed = tensors[LAYER].float() * 1.5
    save_file({**tensors, LAYER: changed, "blocks.9.x.weight": torch.ones(2, 2)}, other)
    code, text, _ = snug("compare", model, other)
    assert code == 0 and "only in" in text and text.splitlines()[1].startswith(f"{LAYER} ")
    code, text, _ = snug("compare", model, other, "--json")
    result = json.loads(text)
    by_name = {entry["name"]: entry for entry in result["tensors"]}
    assert by_name.keys() == tensors.keys() and result["only_b"] == ["blocks.9.x.weight"]
    found = by_name.pop(LAYER)
    assert found["error"] == pytest.approx(0.5, rel=1e-6) and found["bits_b"] == 32
    assert found["largest"] == pytest.approx(tensors[LAYER].float().abs().max().item() / 2)
    assert all(entry["error"] == 0 for entry in by_name.values())


def test_compare_with_a_limit(model: Path, snug: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert snug("quantize", model, out, "--to", "GGUF Q8_0")[0] == 0
    assert snug("compare", model, model, "--max-error", "0")[0] == 0
    assert snug("compare", model, out, "--max-error", "0.02")[0] == 0
    assert snug("compare", model, out, "--max-error", "0.001")[0] == 1


def test_compare_of_strangers(model: Path, snug: Run, tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    code, _, messages = snug("compare", model, tmp_path / "x.safetensors")
    assert code == 1 and "no tensor of one name and shape" in messages


def test_convert_keeps_what_gguf_can_hold(model: Path, snug: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    assert snug("quantize", model, first, "--to", "GGUF Q4_0")[0] == 0
    code, _, messages = snug("convert", first, second)
    assert code == 0 and "3 quantized weights as they were, 0 decoded" in messages
    before, after = (load_diffusion_gguf(path).state_dict for path in (first, second))
    for name, value in before.items():
        other = after[name]
        if isinstance(value, PackedTensor):
            assert isinstance(other, PackedTensor) and torch.equal(value.data, other.data)
        else:
            assert isinstance(other, torch.Tensor) and torch.equal(value, other)


def test_convert_decodes_what_it_cannot(tensors: Tensors, snug: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "nf4.safetensors", tmp_path / "out.gguf"
    stored, metadata = quantize_tensors(tensors, "fp8-rows")
    save_file(stored, path, metadata=metadata)
    code, _, messages = snug("convert", path, out, "--decode-to", "fp16")
    assert code == 0 and "0 quantized weights as they were" in messages and "decoded to fp16" in messages
    assert snug("compare", path, out, "--max-error", "0.001")[0] == 0


def test_started_by_the_path_of_the_folder(root: Path, model: Path, tmp_path: Path) -> None:
    """Without ComfyUI, without an installed package, from another folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(root), "inspect", str(model), "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["architecture"] == "wan"


def test_started_as_a_module(root: Path, tmp_path: Path) -> None:
    link_folder(root, tmp_path / "snug")
    command = [sys.executable, "-m", "snug", "quantize"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: snug quantize" in done.stderr


def test_pip_installs_every_package_of_the_core(root: Path) -> None:
    folders = {path.parent.relative_to(root) for path in (root / "quant_backends").rglob("__init__.py")}
    expected = {"snug", *(".".join(["snug", *folder.parts]) for folder in folders)}
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == expected
