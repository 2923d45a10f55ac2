"""Calibrating in the real ComfyUI: what is recorded is what the layers were given, and the model stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_text_encoders import PROMPT, SmallCLIP, load_dense

LATENT = {"samples": torch.zeros(1, 16, 8, 8)}


def conditioning(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(1, 77, 4096, generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 2048, generator=generator)}]]


def calibrate(patcher: Any, prompts: tuple[int, ...] = (1, 2), steps: int = 2, **keep: Any) -> Any:
    from snug.nodes.adapter.calibration import Keep, Sampling, calibrate_model

    sampling, sensitivity = (
        Sampling(5, steps, 2.0, "euler_ancestral", "normal"),
        keep.pop("sensitivity", False),
    )
    positives = [conditioning(seed) for seed in prompts]
    return calibrate_model(patcher, positives, conditioning(0), LATENT, sampling, Keep(**keep), sensitivity)


def hooks(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_pre_hooks]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import folder_paths
    from snug.nodes.adapter.folders import CALIBRATIONS

    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, CALIBRATIONS.key, ([str(tmp_path / "found")], {".safetensors"})
    )
    return tmp_path / "found"


def test_packed_with_lora_and_dense_agree(sd3: Any, model: Any) -> None:
    packed, dense = sd3
    lora = model.make_lora(packed.model, 1)
    found, report = calibrate(model.with_lora(packed, lora))
    wanted, _ = calibrate(model.with_lora(dense, lora))
    plain, _ = calibrate(dense)
    network = dense.model.diffusion_model
    linear = [name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert set(linear) < set(found.layers)
    assert set(found.layers) == set(wanted.layers)
    last = found.layers["final_layer.linear"]
    # Two prompts and two steps, with the negative prompt in the batch: 16 tokens each.
    assert last.rows == 2 * 2 * 2 * 16
    assert found.info["calls"] == 4
    assert found.info["samples"] == 2
    for name, layer in wanted.layers.items():
        assert model.relative_error(found.layers[name].mean_square, layer.mean_square) < 1e-3, name
        assert model.relative_error(found.layers[name].absmax, layer.absmax) < 1e-2, name
    without = plain.layers["final_layer.linear"].mean_square
    assert model.relative_error(without, wanted.layers["final_layer.linear"].mean_square) > 0.01
    assert report.startswith(f"{len(found.layers)} layers of SD3 recorded (2 samples, 4 steps, 4 calls)")


def test_statistics_are_those_of_the_layers_inputs(sd3: Any, model: Any) -> None:
    _, dense = sd3
    layer = dense.model.diffusion_model.joint_blocks[0].x_block.mlp.fc1
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    found, _ = calibrate(dense)
    handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    recorded = found.layers["joint_blocks.0.x_block.mlp.fc1"]
    torch.testing.assert_close(recorded.mean_square, rows.square().mean(0), rtol=1e-4, atol=0)
    assert torch.equal(recorded.absmax, rows.abs().amax(0))
    assert recorded.rows == len(rows)


def test_recording_does_not_change_what_is_sampled(sd3: Any) -> None:
    import comfy.sample
    from snug.quant_backends.quantization.recording import Recorder

    _, dense = sd3

    def sample() -> torch.Tensor:
        noise = comfy.sample.prepare_noise(LATENT["samples"], 3)
        prompts = conditioning(1), conditioning(2)
        options = {"disable_pbar": True, "seed": 3}
        return comfy.sample.sample(
            dense, noise, 3, 2.0, "euler_ancestral", "normal", *prompts, LATENT["samples"], **options
        )

    before = sample()
    with Recorder(dense.model.diffusion_model):
        recorded = sample()
    assert torch.equal(recorded, before)


def test_cancelling_leaves_the_model_as_it_was(sd3: Any, model: Any) -> None:
    import comfy.model_management as management

    packed, _ = sd3
    before = model.run(packed, load=True)
    layer = packed.model.diffusion_model.joint_blocks[1].x_block.mlp.fc1
    calls = []

    def cancel(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing()

    handle = layer.register_forward_pre_hook(cancel)
    with pytest.raises(management.InterruptProcessingException):
        calibrate(packed, steps=4)
    handle.remove()
    management.interrupt_current_processing(False)
    assert len(calls) < 8
    assert hooks(packed.model) == []
    assert torch.equal(model.run(packed, load=True), before)
    calibrate(packed)
    assert hooks(packed.model) == []
    assert torch.equal(model.run(packed, load=True), before)


def test_compiled_models_are_recorded_uncompiled(sd3: Any) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    _, dense = sd3
    wanted, _ = calibrate(dense, (1,), 1)
    compiled = dense.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    found, _ = calibrate(compiled, (1,), 1)
    assert set(found.layers) == set(wanted.layers)
    assert compiled.wrappers, "the given model keeps its compiling"


def test_saved_loaded_and_added_to(sd3: Any, folder: Path) -> None:
    from snug.nodes.adapter.calibration import open_calibration
    from snug.nodes.adapter.folders import CALIBRATIONS
    from snug.quant_backends.core.errors import SnugError

    _, dense = sd3
    first, report = calibrate(dense, (1,), 1, save_as="sd3/portraits")
    assert f"saved as {folder / 'sd3' / 'portraits.safetensors'}" in report
    loaded, _ = open_calibration("sd3/portraits.safetensors")
    assert loaded.info == first.info
    both, _ = calibrate(dense, (2,), 1, save_as="sd3/portraits.safetensors", previous=loaded)
    assert CALIBRATIONS.files() == ["sd3/portraits-2.safetensors", "sd3/portraits.safetensors"]
    assert both.info["samples"] == 2
    for name, layer in both.layers.items():
        assert layer.rows == 2 * first.layers[name].rows
        assert (layer.absmax >= first.layers[name].absmax).all()
    for name in ("../outside", "a/../../outside", "..", "/", "folder/"):
        with pytest.raises(SnugError, match="cannot be saved as"):
            calibrate(dense, (1,), 1, save_as=name)
    with pytest.raises(SnugError, match="was not found"):
        open_calibration("gone.safetensors")


def test_nodes(sd3: Any, folder: Path) -> None:
    from snug.nodes.calibrate import SnugCalibrate, SnugLoadCalibration

    settings = {"seed": 2**64 - 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    found, report = SnugCalibrate.execute(
        sd3[0],
        conditioning(1),
        conditioning(2),
        LATENT,
        **settings,
        positive_3=conditioning(3),
        save_as="some",
    ).result
    assert found.info["samples"] == 2
    loaded, again = SnugLoadCalibration.execute("some.safetensors").result
    assert set(loaded.layers) == set(found.layers)
    assert report.startswith(again.split("\n")[0])
    before = SnugLoadCalibration.fingerprint_inputs("some.safetensors")
    (folder / "some.safetensors").touch()
    assert SnugLoadCalibration.fingerprint_inputs("some.safetensors") != before


def test_text_encoders(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from snug.nodes.adapter.calibration import Keep, calibrate_clip
    from snug.quant_backends.core.errors import SnugError

    save_file(SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json"), tmp_path / "clip.safetensors")
    clip = load_dense(comfy, tmp_path / "clip.safetensors", "stable_diffusion")
    before = clip.encode_from_tokens(clip.tokenize(PROMPT))
    found, report = calibrate_clip(clip, f"{PROMPT}\n\n a house \n", Keep())
    assert found.info["samples"] == 2
    assert all(name in dict(clip.cond_stage_model.named_modules()) for name in found.layers)
    assert any("mlp.fc1" in name for name in found.layers)
    assert "2 samples" in report
    assert torch.equal(clip.encode_from_tokens(clip.tokenize(PROMPT)), before)
    assert hooks(clip.cond_stage_model) == []
    with pytest.raises(SnugError, match="no prompt"):
        calibrate_clip(clip, " \n", Keep())


def test_measured_sensitivity_guides_the_automatic_mix(sd3: Any, model: Any, folder: Path) -> None:
    from snug.nodes.adapter.calibration import open_calibration
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_model

    _, dense = sd3
    before = model.run(dense, load=True)
    found, report = calibrate(dense, prompts=(1,), steps=1, save_as="known", sensitivity=True)
    assert "the image depends most on: " in report
    assert torch.equal(model.run(dense, load=True), before)
    assert not [name for name, module in dense.model.named_modules() if module._forward_hooks]
    network = dense.model.diffusion_model
    linear = {name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert found.sensitivity.keys() == linear
    assert all(value > 0 for value in found.sensitivity.values())
    assert open_calibration("known.safetensors")[0].sensitivity == found.sensitivity
    # Half a measure between Q8_0 and 16 bits: the layers that matter most are those that keep them.
    size = (dense.model_size() * 0.8) / 2**30
    new, report = quantize_model(dense, QuantizeSettings("GGUF Q8_0", calibration=found, fit_gb=size))
    assert "was not measured" not in report
    assert new.model_size() <= size * 2**30
