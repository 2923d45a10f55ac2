"""Quantizing a MODEL or CLIP in memory equals the dense model with the same rounded weights, for every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory_states import LOADS, load_whole
from safetensors.torch import save_file
from small_text_encoders import SmallCLIP, encode, load_dense
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.quantization import targets

TARGETS = [target.name for target in targets().values() if not target.unavailable]


def quantize(patcher: Any, target: str = "GGUF Q4_0", **settings: Any) -> tuple[Any, str]:
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_model

    return quantize_model(patcher, QuantizeSettings(target, **settings))


def round_in_place(dense: Any, quantized: Any, model: Any) -> list[str]:
    """Gives the dense model the decoded weights of the quantized one; names of the layers."""
    from snug.nodes.adapter.layout import packed_tensor

    names = []
    for name, layer in model.packed_modules(quantized.model):
        weight = dequantize_packed(packed_tensor(layer.weight))
        dense.model.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
        names.append(name)
    return names


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str, twins: Any, model: Any) -> None:
    _, dense = twins("sd3", "F32").load()
    before = model.run(dense, load=True)
    new, report = quantize(dense, target)
    found = model.run(new, load=True)
    assert torch.equal(model.run(dense, load=True), before), "the given model has changed"
    assert torch.equal(found, before) == (target == "GGUF F16"), "the file is F16"
    _, other = twins("sd3", "F32").load()
    names = round_in_place(other, new, model)
    assert report.startswith(f"{len(names)} layers quantized to {target}\n") and len(names) > 30
    assert model.relative_error(found, model.run(other, load=True)) < 1e-5
    lora = model.make_lora(new.model, 1)
    change = model.run(model.with_lora(new, lora), load=True) - found
    wanted = model.run(model.with_lora(other, lora), load=True) - model.run(other, load=True)
    assert wanted.abs().max() > 0.05
    assert model.relative_error(change, wanted) < 1e-3


@pytest.mark.parametrize("load", LOADS)
def test_fused_lora_is_in_the_weights(load: Any, sd3: Any, model: Any) -> None:
    packed, dense = sd3
    patched = model.with_lora(dense, model.make_lora(packed.model, 1))
    wanted = model.run(patched, load=True)
    load_whole(patched)  # merged into its weights when quantizing comes
    beside, _ = quantize(patched, "GGUF Q8_0")
    fused, report = quantize(patched, "GGUF Q8_0", fuse_lora=True)
    assert len(beside.patches) == len(patched.patches)
    inside = [name for name, _ in model.packed_modules(fused.model)]
    assert not {f"{name}.weight" for name in inside} & fused.patches.keys()
    assert f"LoRA is in the weights of {len(inside)} layers" in report
    for new in (beside, fused):
        load(new)
        assert model.relative_error(model.run(new), wanted) < 0.02
        new.detach()
    assert model.relative_error(model.run(patched, load=True), wanted) < 1e-6


def test_quantized_layers_stay_unless_wished(twins: Any, model: Any) -> None:
    packed, _ = twins("sd3", "Q4_0").load()
    before = {name: layer.weight._qdata for name, layer in model.packed_modules(packed.model)}
    same, report = quantize(packed, "GGUF Q8_0", skip="")
    for name, layer in model.packed_modules(same.model):
        if name in before and layer.weight.params.format == "Q4_0":
            assert layer.weight._qdata.data_ptr() == before[name].data_ptr()
    assert "0 layers were quantized already" not in report
    again, report = quantize(packed, "GGUF Q8_0", requantize=True)
    formats = {layer.weight.params.format for _, layer in model.packed_modules(again.model)}
    assert "Q8_0" in formats and "Q4_0" not in formats
    assert "\n0 layers were quantized already" in report
    assert model.relative_error(model.run(again, load=True), model.run(packed, load=True)) < 0.02


def test_cores_own_quantized_layers_again(twins: Any, model: Any) -> None:
    import comfy.sd

    source = comfy.sd.load_diffusion_model(str(twins("sd3", "fp8").gguf))
    before = model.run(source, load=True)
    new, _ = quantize(source, "GGUF Q8_0", requantize=True)
    assert model.relative_error(model.run(new, load=True), before) < 0.02
    assert torch.equal(model.run(source, load=True), before)


def test_calibration(sd3: Any, model: Any) -> None:
    """It reaches the encoders, and what they save on the channels that do not matter is seen in the output."""
    from snug.nodes.adapter.provenance import provenance_of
    from snug.quant_backends.quantization.recording import Recorder

    _, dense = sd3
    with Recorder(dense.model.diffusion_model) as recorder:
        wanted = model.run(dense, load=True)
    calibration = recorder.calibration()
    plain, _ = quantize(dense, "GGUF Q3_K")
    calibrated, _ = quantize(dense, "GGUF Q3_K", calibration=calibration)
    assert provenance_of(calibrated).recipes[-1]["calibrated_layers"] > 30
    errors = [model.relative_error(model.run(new, load=True), wanted) for new in (calibrated, plain)]
    assert errors[0] < errors[1]


def test_calibration_of_another_model_is_refused(sd3: Any) -> None:
    from snug.quant_backends.quantization.calibration import Calibration, LayerStatistics

    ones = torch.ones(8)
    statistics = LayerStatistics(ones, ones, torch.tensor([-1.0, 1.0]), 1)
    with pytest.raises(SnugError, match="none of this model's layers"):
        quantize(sd3[1], calibration=Calibration({"elsewhere": statistics}, {}))
    with pytest.raises(SnugError, match="another model"):
        layer = "joint_blocks.0.x_block.attn.qkv"
        quantize(sd3[1], calibration=Calibration({layer: statistics}, {}))


def test_fitting_a_size(sd3: Any, model: Any) -> None:
    _, dense = sd3
    uniform, _ = quantize(dense, "GGUF Q4_K")
    budget = int(uniform.model_size() * 1.15)
    mixed, report = quantize(dense, "GGUF Q4_K", fit_gb=budget / 2**30)
    assert uniform.model_size() < mixed.model_size() <= budget
    formats = {layer.weight.params.format for _, layer in model.packed_modules(mixed.model)}
    assert len(formats) > 1 and "automatic mix: " in report
    assert f"{len(list(model.packed_modules(mixed.model)))} layers quantized" in report
    wanted = model.run(dense, load=True)
    errors = [model.relative_error(model.run(new, load=True), wanted) for new in (mixed, uniform)]
    assert errors[0] < errors[1] < 0.2
    with pytest.raises(SnugError, match="cannot be brought to"):
        quantize(dense, fit_gb=0.001)


def test_wrong_names(sd3: Any) -> None:
    with pytest.raises(SnugError, match="no quantization called 'Q9'"):
        quantize(sd3[1], "Q9")
    with pytest.raises(SnugError, match="no regular expression"):
        quantize(sd3[1], skip="default, (")


def test_cancelling_leaves_the_model_alone(sd3: Any, model: Any) -> None:
    import comfy.model_management as management

    _, dense = sd3
    before = model.run(dense, load=True)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        quantize(dense)
    assert torch.equal(model.run(dense, load=True), before)


def test_clip(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any) -> None:
    from snug.nodes.quantize import SnugQuantizeTextEncoder

    save_file(SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json"), tmp_path / "clip.safetensors")
    clip, other = (load_dense(comfy, tmp_path / "clip.safetensors", "stable_diffusion") for _ in range(2))
    before = encode(clip)
    new, report = SnugQuantizeTextEncoder.execute(clip, "GGUF Q4_0", "default").args
    assert len(round_in_place(other.patcher, new.patcher, model)) == 72
    assert report.startswith("72 layers quantized to GGUF Q4_0")
    assert model.relative_error(encode(new), encode(other)) < 1e-5
    assert 1e-3 < model.relative_error(encode(new), before) < 0.2
    assert torch.equal(encode(clip), before)


@pytest.mark.parametrize("target", ["GGUF Q4_K", "GGUF Q8_0"])
def test_rows_that_are_no_blocks_are_folded_as_in_files(target: str, twins: Any, model: Any) -> None:
    """Stable Diffusion's convolutions and narrow layers: as GGUF files hold them, and with LoRA."""
    from snug.nodes.adapter.layout import packed_tensor
    from snug.quant_backends.formats import FORMATS
    from snug.quant_backends.kernels.dequantize import quantize_packed

    _, dense = twins("sd15", "F32").load()
    new, _ = quantize(dense, target)
    formats = {
        name: packed_tensor(layer.weight).format.name for name, layer in model.packed_modules(new.model)
    }
    kernels = [name for name in formats if new.model.get_submodule(name).weight.dim() == 4]
    assert kernels and not any("input_blocks.0.0" in name or name.endswith("out.2") for name in formats)
    for name in kernels[:3]:
        weight = dense.model.get_submodule(name).weight.detach().float()
        fmt = FORMATS[target.removeprefix("GGUF ")]
        expected = quantize_packed(weight.reshape(-1, 256), fmt)
        assert torch.equal(packed_tensor(new.model.get_submodule(name).weight).data, expected.data)
    lora = model.make_lora(new.model, 1)
    wanted = model.run(model.with_lora(new, lora), load=True)
    _, other = twins("sd15", "F32").load()
    round_in_place(other, new, model)
    assert model.relative_error(wanted, model.run(model.with_lora(other, lora), load=True)) < 1e-5
