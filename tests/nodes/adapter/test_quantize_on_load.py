"""Quantizing while a file is loaded gives what quantizing the loaded model gives, in less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import clip_weights, diffusion_weights, prefixed, shrink_clip, taesd
from safetensors.torch import load_file, save_file
from small_text_encoders import SmallCLIP, encode, load_dense
from snug.quant_backends.core.errors import SnugError
from tiny import make_tiny_model

TARGET = "GGUF Q8_0"


def load(path: Path, target: str = TARGET) -> Any:
    from snug.nodes.adapter.loading import load_diffusion_model

    return load_diffusion_model(str(path), quantize=target)


def quantize(patcher: Any, target: str = TARGET) -> Any:
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_model

    return quantize_model(patcher, QuantizeSettings(target))[0]


def formats(patcher: Any, model: Any) -> dict[str, str]:
    found = {name: layer.weight.params.format for name, layer in model.packed_modules(patcher.model)}
    return {name: format for name, format in found.items() if format not in ("F16", "BF16")}


@pytest.mark.parametrize("family", ["sd3", "sd15"])
@pytest.mark.parametrize("target", [TARGET, "FP8 e4m3fn per row"])
def test_equals_quantizing_afterwards(family: str, target: str, tmp_path: Path, model: Any) -> None:
    import comfy.sd

    make_tiny_model(family, tmp_path / "model.safetensors")
    new = load(tmp_path / "model.safetensors", target)
    dense = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
    wanted = quantize(dense, target)
    assert formats(new, model) == formats(wanted, model) != {}
    assert new.model_size() < dense.model_size()
    found = model.run(new, load=True)
    assert model.relative_error(found, model.run(wanted, load=True)) < 1e-6
    assert not torch.equal(found, model.run(dense, load=True))
    factory, arguments = new.cached_patcher_init
    assert torch.equal(model.run(factory(*arguments, disable_dynamic=True), load=True), found)


def test_float8_files(tmp_path: Path, model: Any) -> None:
    """Nothing of them is left in float8, in which torch calculates nothing."""
    make_tiny_model("sd3", tmp_path / "model.safetensors")
    half = load_file(tmp_path / "model.safetensors")
    float8 = {
        name: value.to(torch.float8_e4m3fn) if value.dim() == 2 else value for name, value in half.items()
    }
    save_file(float8, tmp_path / "float8.safetensors")
    save_file({name: value.float() for name, value in float8.items()}, tmp_path / "float32.safetensors")
    outputs = [model.run(load(tmp_path / f"{name}.safetensors"), load=True) for name in ("float8", "float32")]
    assert model.relative_error(*outputs) < 1e-5


def test_what_is_quantized_in_the_file_stays(twins: Any, model: Any) -> None:
    for format in ("Q4_0", "nf4", "fp8"):
        path = twins("sd3", format).gguf
        before, after = load(path, "as in the file"), load(path)
        kept = formats(before, model)
        assert kept.items() <= formats(after, model).items()
        assert model.relative_error(model.run(after, load=True), model.run(before, load=True)) < 0.02


def test_text_encoders(
    comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any, twins: Any
) -> None:
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_clip
    from snug.nodes.adapter.text_encoders import load_text_encoders

    weights = SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json")
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / "clip.safetensors")
    path = str(tmp_path / "clip.safetensors")
    new = load_text_encoders([path], "stable_diffusion", quantize="GGUF Q4_0")
    wanted, _ = quantize_clip(
        load_dense(comfy, Path(path), "stable_diffusion"), QuantizeSettings("GGUF Q4_0")
    )
    assert formats(new.patcher, model) == formats(wanted.patcher, model)
    assert len(formats(new.patcher, model)) == 72
    assert model.relative_error(encode(new), encode(wanted)) < 1e-5
    factory, arguments = new.patcher.cached_patcher_init
    assert formats(factory(*arguments, disable_dynamic=True), model) == formats(new.patcher, model)


def test_checkpoint(
    comfy: Any, monkeypatch: pytest.MonkeyPatch, comfyui_path: Path, tmp_path: Path, model: Any
) -> None:
    from snug.nodes.adapter.checkpoints import load_checkpoint

    shrink_clip(monkeypatch)
    tensors = {
        **prefixed("model.diffusion_model.", diffusion_weights(tmp_path, "sd15")),
        **prefixed("cond_stage_model.transformer.", clip_weights(comfyui_path, "clip_l")),
        **prefixed("first_stage_model.", taesd(tmp_path, "taesd")),
    }
    path = tmp_path / "all.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    plain = load_checkpoint(str(path))
    patcher, clip, vae = load_checkpoint(str(path), quantize=TARGET, quantize_text_encoders="GGUF Q4_0")
    assert set(formats(patcher, model).values()) == {"Q8_0"}
    assert set(formats(clip.patcher, model).values()) == {"Q4_0"}
    assert model.relative_error(model.run(patcher, load=True), model.run(plain[0], load=True)) < 0.02
    assert 1e-4 < model.relative_error(encode(clip), encode(plain[1])) < 0.3
    image = torch.rand(1, 64, 64, 3)
    assert torch.equal(vae.encode(image), plain[2].encode(image))
    model_alone, _, _ = load_checkpoint(str(path), quantize=TARGET)
    assert torch.equal(model.run(model_alone, load=True), model.run(patcher, load=True))


def test_unknown_target(tmp_path: Path) -> None:
    make_tiny_model("sd3", tmp_path / "model.safetensors")
    with pytest.raises(SnugError, match="no quantization called 'Q9'"):
        load(tmp_path / "model.safetensors", "Q9")


def test_cancelling(tmp_path: Path, comfy: Any) -> None:
    import comfy.model_management as management

    make_tiny_model("sd3", tmp_path / "model.safetensors")
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        load(tmp_path / "model.safetensors")


MEASURE = """
import json, sys, threading, time
sys.path.insert(0, {scripts!r})
from tiny import use_comfyui
use_comfyui({comfyui!r})
from snug_path import register_snug
register_snug()
import comfy.sd
from snug.nodes.adapter.loading import load_diffusion_model

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

load_diffusion_model({small!r}, quantize={target!r})  # imports and tables
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
patcher = load_diffusion_model({file!r}, quantize={target!r})
done = True
watcher.join()
print(json.dumps({{"peak": peak - before, "after": anonymous() - before, "size": patcher.model_size()}}))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the memory of a process as Linux tells it"
)
@pytest.mark.parametrize("target", [TARGET, "FP8 e4m3fn per row"])
def test_memory(target: str, tmp_path: Path, comfyui_path: Path, root: Path) -> None:
    """At most the quantized size and two of the largest tensors in float32; pages of the mapped file do not count."""
    from dataclasses import replace

    from tiny import families

    wan = families.FAMILIES["wan"]
    config = {**wan.config, "dim": 1024, "ffn_dim": 8192, "num_heads": 8, "num_layers": 3}
    small = tmp_path / "small.safetensors"
    make_tiny_model("wan", small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "wan", replace(wan, config=config))
        shapes = make_tiny_model("wan", tmp_path / "large.safetensors")
    script = MEASURE.format(
        scripts=str(root / "scripts"),
        comfyui=str(comfyui_path),
        small=str(small),
        file=str(tmp_path / "large.safetensors"),
        target=target,
    )
    # Large tensors are given back to the system when they are freed: what malloc keeps of them is held by nobody.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    largest = 4 * max(shape.numel() for shape in shapes.values())
    dense = 2 * sum(shape.numel() for shape in shapes.values())
    assert found["peak"] <= found["size"] + 2 * largest < dense
