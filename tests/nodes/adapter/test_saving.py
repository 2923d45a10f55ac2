"""Saved models load again to exactly what was saved, and no file is ever left half written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_text_encoders import SmallCLIP, encode, load_dense
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.quantization import product_targets, targets
from tiny import make_tiny_model

TARGETS = [
    target.name
    for target in (*targets().values(), *product_targets().values())
    if not target.unavailable and target.calibrated is None
]


@pytest.fixture(autouse=True)
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's output folder."""
    import folder_paths

    folder = tmp_path / "output"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    return folder


def quantize(patcher: Any, target: str, **settings: Any) -> Any:
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_model

    return quantize_model(patcher, QuantizeSettings(target, **settings))[0]


def save(patcher: Any, prefix: str = "model", **settings: Any) -> Path:
    from snug.nodes.adapter.saving import SaveSettings, save_model

    return save_model(patcher, SaveSettings(prefix, **settings))[0]


def load(path: Path) -> Any:
    from snug.nodes.adapter.loading import load_diffusion_model

    return load_diffusion_model(str(path))


def weights(patcher: Any, model: Any) -> dict[str, tuple[str, torch.Tensor]]:
    """Format and bytes of every quantized weight."""
    return {
        name: (layer.weight.params.format, layer.weight._qdata.view(torch.uint8).flatten())
        for name, layer in model.packed_modules(patcher.model)
        if layer.weight.params.format not in ("F16", "BF16")
    }


def same_weights(one: Any, other: Any, model: Any, formats: bool = True) -> None:
    """formats: whether they have the same names, which groups as long as a row may not have in a file."""
    first, second = weights(one, model), weights(other, model)
    assert first.keys() == second.keys()
    for name, (format, data) in first.items():
        assert second[name][0] == format or not formats
        assert torch.equal(second[name][1], data), name


def container(target: str) -> str:
    return "GGUF" if target.startswith("GGUF") else "auto"


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_round_trip(target: str, twins: Any, model: Any) -> None:
    """Quantize, predict; save, load, predict."""
    _, dense = twins("sd3", "F32").load()
    new = quantize(dense, target)
    wanted = model.run(new, load=True)
    path = save(new, container=container(target))
    again = load(path)
    found = model.run(again, load=True)
    same_weights(new, again, model)
    assert torch.equal(found, wanted)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_core_refuses_files_that_it_would_misread(twins: Any, model: Any) -> None:
    import comfy.sd

    _, dense = twins("sd3", "F32").load()
    path = save(quantize(dense, "INT8 static", calibration=recorded(dense, model)))
    with pytest.raises(KeyError, match="snug_int8"):
        comfy.sd.load_diffusion_model(str(path))


@pytest.mark.parametrize("target", ["INT8 static", "FP8 static"])
def test_static_targets(target: str, twins: Any, model: Any) -> None:
    """The same prediction from the file, and with a LoRA merged into its weights about the same as beside them."""
    _, dense = twins("sd3", "F32").load()
    new = quantize(dense, target, calibration=recorded(dense, model))
    assert any("-static" in format for format, _ in weights(new, model).values())
    wanted = model.run(new, load=True)
    again = load(save(new))
    same_weights(new, again, model)
    assert torch.equal(model.run(again, load=True), wanted)
    patched = model.with_lora(new, model.make_lora(new.model, 1))
    merged = load(save(patched))
    assert {format for format, _ in weights(merged, model).values()} == {
        format for format, _ in weights(new, model).values()
    }
    assert model.relative_error(model.run(merged, load=True), model.run(patched, load=True)) < 0.1


def recorded(patcher: Any, model: Any) -> Any:
    """A calibration from one call of the network."""
    from snug.quant_backends.quantization.recording import Recorder

    patcher.model.diffusion_model.eval()
    with Recorder(patcher.model.diffusion_model, patcher.load_device) as recorder:
        model.run(patcher, load=True)
    return recorder.calibration(calls=1)


@pytest.mark.parametrize("target", ["GGUF Q4_K_S", "FP8 e4m3fn per row"])
@pytest.mark.parametrize("family", ["sd15", "wan", "ltxv"])
def test_families(family: str, target: str, tmp_path: Path, model: Any) -> None:
    import comfy.sd

    make_tiny_model(family, tmp_path / "model.safetensors")
    new = quantize(comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors")), target)
    again = load(save(new, container=container(target)))
    same_weights(new, again, model)
    saved, wanted = again.model.state_dict(), new.model.state_dict()
    assert saved.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(saved[name].to("cpu"), value.to("cpu").to(saved[name].dtype)), name


@pytest.mark.parametrize("format", ["Q4_0", "Q4_K", "nf4", "fp8", "quanto-int8"])
def test_loaded_files_come_out_as_they_were(format: str, twins: Any, model: Any) -> None:
    packed, _ = twins("sd3", format).load()
    again = load(save(packed))
    same_weights(packed, again, model)
    assert torch.equal(model.run(again, load=True), model.run(packed, load=True))


@pytest.mark.parametrize("format", ["auto", "GGUF"])
def test_plain_models(format: str, twins: Any, model: Any) -> None:
    _, dense = twins("sd3", "F32").load()
    path = save(dense, container=format)
    assert path.suffix == (".gguf" if format == "GGUF" else ".safetensors")
    assert path.stat().st_size < 0.7 * dense.model_size(), "in 16 bits, as they were"
    assert torch.equal(model.run(load(path), load=True), model.run(dense, load=True))


def test_lora(sd3: Any, model: Any) -> None:
    packed, dense = sd3
    for patcher in (packed, quantize(dense, "FP8 e4m3fn per row"), dense):
        patched = model.with_lora(patcher, model.make_lora(packed.model, 1))
        plain, wanted = model.run(patcher, load=True), model.run(patched, load=True)
        merged = load(save(patched))
        error = model.relative_error(model.run(merged, load=True), wanted)
        assert error < (1e-3 if patcher is dense else 0.15)
        assert error < 0.5 * model.relative_error(plain, wanted)
        without = model.run(load(save(patched, lora="leave out")), load=True)
        assert model.relative_error(without, plain) < 1e-6
        with pytest.raises(SnugError, match="LoRAs on [0-9]+ weights; set lora to 'merge'"):
            save(patched, lora="refuse")
        assert torch.equal(model.run(patched, load=True), wanted), "the given model has changed"


def test_names_that_are_taken(twins: Any, output: Path) -> None:
    packed, _ = twins("sd3", "Q4_0").load()
    assert [save(packed, "a/b").name for _ in range(2)] == ["b_00001_.gguf", "b_00002_.gguf"]
    first = save(packed, "a/b.gguf", collision="refuse")
    assert first == output / "a" / "b.gguf"
    with pytest.raises(SnugError, match=r"b.gguf exists already; choose another name"):
        save(packed, "a/b", collision="refuse")
    before = first.stat().st_ino
    assert save(packed, "a/b", collision="replace") == first
    assert first.stat().st_ino != before, "the file that is mapped must not be written over"
    for wrong in ("", "../b", "/b/../..", "a/"):
        with pytest.raises(SnugError, match="is no name inside"):
            save(packed, wrong)


def test_among_the_models(twins: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    from snug.nodes.adapter.folders import find_diffusion_model

    folders = ([str(tmp_path / "unet"), str(tmp_path / "diffusion_models")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", folders)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "unet_gguf", (folders[0], {".gguf"}))
    packed, _ = twins("sd3", "Q4_0").load()
    path = save(packed, "diffusion_models/mine", folder="models folder", collision="replace")
    assert path == tmp_path / "diffusion_models" / "mine.gguf"
    assert find_diffusion_model("mine.gguf") == str(path)


def test_formats_that_do_not_fit(twins: Any) -> None:
    ggml, nf4 = twins("sd3", "Q4_0").load()[0], twins("sd3", "nf4").load()[0]
    with pytest.raises(
        SnugError, match="weights are in GGUF's Q4_0, which safetensors files do not have; set format"
    ):
        save(ggml, container="safetensors")
    with pytest.raises(
        SnugError, match="weights are in bnb-nf4-64, which GGUF files do not have; set format"
    ):
        save(nf4, container="GGUF")
    with pytest.raises(SnugError, match="which quanto does not hold; it holds"):
        save(nf4, container="safetensors (quanto)")
    mixed = quantize(nf4, "GGUF Q8_0", skip="")
    if len({name for name, _ in weights_of_formats(mixed)}) > 1:
        with pytest.raises(SnugError, match="beside others in bnb-nf4-64"):
            save(mixed)


def weights_of_formats(patcher: Any) -> list[tuple[str, Any]]:
    from snug.nodes.adapter.packed_module import packed_modules

    return [(layer.weight.params.format, layer) for _, layer in packed_modules(patcher.model)]


def test_cores_own_quantized_layers_are_refused(twins: Any) -> None:
    import comfy.sd

    source = comfy.sd.load_diffusion_model(str(twins("sd3", "fp8").gguf))
    with pytest.raises(SnugError, match="quantized format of ComfyUI's own; put Quantize Model"):
        save(source)


def test_provenance(tmp_path: Path, model: Any) -> None:
    import hashlib

    source = tmp_path / "source.safetensors"
    make_tiny_model("sd3", source)
    from snug.nodes.adapter.loading import load_diffusion_model

    loaded = load_diffusion_model(str(source), quantize="FP8 e4m3fn per row")
    path = save(model.with_lora(loaded, model.make_lora(loaded.model, 1)), texts={"prompt": "{}"})
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["snug_provenance"])
        assert file.metadata()["prompt"] == "{}"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert found["source"] == [{"file": source.name, "bytes": source.stat().st_size, "sha256": digest}]
    assert [recipe["target"] for recipe in found["recipes"]] == ["FP8 e4m3fn per row"]
    assert found["lora"] == "merge" and found["version"]
    source.write_bytes(source.read_bytes() + b"\0")  # no longer what was loaded
    with safe_open(save(loaded), "pt") as file:
        assert "sha256" not in json.loads(file.metadata()["snug_provenance"])["source"][0]


@pytest.mark.parametrize("target", ["GGUF Q8_0", "FP8 e4m3fn per row"])
def test_cancelling_at_ten_points(
    target: str, twins: Any, output: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management
    from snug.nodes.adapter import saving

    _, dense = twins("sd3", "F32").load()
    new = quantize(dense, target)
    path = save(new, "kept", collision="replace")
    before = path.read_bytes()
    calls = 0
    original = saving._report

    def count(bar: Any, part: float) -> None:
        nonlocal calls
        calls += 1
        original(bar, part)

    monkeypatch.setattr(saving, "_report", count)
    save(new, "kept", collision="replace")
    total = calls
    assert total > 10
    for point in range(10):
        calls, stop = 0, 1 + point * (total - 1) // 9

        def report(bar: Any, part: float, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                management.interrupt_current_processing()
            original(bar, part)

        monkeypatch.setattr(saving, "_report", report)
        with pytest.raises(management.InterruptProcessingException):
            save(new, "kept", collision="replace")
        assert path.read_bytes() == before
        assert [file.name for file in output.iterdir()] == [path.name]
    assert model.relative_error(model.run(load(path), load=True), model.run(new, load=True)) == 0


def test_a_full_disk(twins: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Announced before anything is written; and when the disk fills up meanwhile, the old file stays."""
    import folder_paths

    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        monkeypatch.setattr(folder_paths, "output_directory", str(folder))
        packed, dense = twins("sd3", "Q4_0").load()
        path = save(packed, "kept", collision="replace")
        before = path.read_bytes()
        (folder / "filling").write_bytes(bytes(shutil.disk_usage(folder).free - (1 << 20)))
        with pytest.raises(SnugError, match=r"needs .* GB, but its disk has .* GB free"):
            save(packed, "kept", collision="replace")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        for patcher in (packed, quantize(dense, "FP8 e4m3fn per row")):
            with pytest.raises(SnugError, match="could not be written .* nothing of it was left behind"):
                save(patcher, "kept", collision="replace")
            assert path.read_bytes() == before
            assert sorted(file.name for file in folder.iterdir()) == ["filling", "kept.gguf"]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


KILLED = """
import sys, time
sys.path.insert(0, {scripts!r})
from tiny import use_comfyui
use_comfyui({comfyui!r})
from snug_path import register_snug
register_snug()
import folder_paths
folder_paths.output_directory = {output!r}
from snug.nodes.adapter import saving
from snug.nodes.adapter.loading import load_diffusion_model
patcher = load_diffusion_model({file!r})
saving.save_model(patcher, saving.SaveSettings("kept", collision="replace"))
def report(bar, part):
    if part > 0.5:
        print("half", flush=True)
        time.sleep(600)
saving._report = report
saving.save_model(patcher, saving.SaveSettings("kept", collision="replace"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_killing_the_process(twins: Any, output: Path, comfyui_path: Path, root: Path, model: Any) -> None:
    packed, _ = twins("sd3", "Q4_0").load()
    script = KILLED.format(
        scripts=str(root / "scripts"),
        comfyui=str(comfyui_path),
        output=str(output),
        file=str(twins("sd3", "Q4_0").gguf),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        assert "half" in iter(process.stdout.readline, "").__next__()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    names = sorted(file.name for file in output.iterdir())
    assert len(names) == 2 and names[1] == "kept.gguf" and names[0].endswith(".part")
    assert torch.equal(model.run(load(output / "kept.gguf"), load=True), model.run(packed, load=True))
    save(packed, "kept", collision="replace")
    assert [file.name for file in output.iterdir()] == ["kept.gguf"], "the next save takes it away"


def test_text_encoders(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any) -> None:
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_clip
    from snug.nodes.adapter.saving import SaveSettings, save_text_encoders
    from snug.nodes.adapter.text_encoders import load_text_encoders

    small = SmallCLIP(comfy, monkeypatch)
    save_file(small.weights("sd1_clip_config.json"), tmp_path / "clip.safetensors")
    clip = load_dense(comfy, tmp_path / "clip.safetensors", "stable_diffusion")
    for target in (name for name in TARGETS if not name.startswith("GGUF")):
        new, _ = quantize_clip(clip, QuantizeSettings(target))
        (path,) = save_text_encoders(new, SaveSettings("encoder"))
        again = load_text_encoders([str(path)], "stable_diffusion")
        if weights(again.patcher, model):
            same_weights(new.patcher, again.patcher, model, formats=False)
            assert torch.equal(encode(again), encode(new)), target
        else:  # ComfyUI's own loader takes the file
            assert model.relative_error(encode(again), encode(new)) < 0.02
    (plain,) = save_text_encoders(clip, SaveSettings("plain"))
    assert load_file(plain).keys() >= load_file(tmp_path / "clip.safetensors").keys()
    assert torch.equal(encode(load_dense(comfy, plain, "stable_diffusion")), encode(clip))
