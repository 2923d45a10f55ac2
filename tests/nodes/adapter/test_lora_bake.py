"""Baking LoRA into quantized weights, ComfyUI's plain float8 weights, and what the report of LoRA Mode says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from adapter_files import make_adapter
from memory_states import LOADS, load_whole

STRENGTH = 0.7
BAKE, MERGE, BRANCH = "bake in", "merge while dequantizing", "side branch"
# Formats that are written, and the largest part of a weight that rounding to them changes.
WRITTEN = [
    ("Q8_0", 0.01),
    ("Q4_0", 0.15),
    ("F16", 1e-3),
    ("int8", 0.02),
    ("fp8-rows", 0.04),
    ("torchao-int8", 0.02),
]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def set_mode(patcher: Any, mode: str, cache: bool = True) -> tuple[Any, str]:
    from snug.nodes.adapter.lora_mode import set_lora_mode

    return set_lora_mode(patcher, mode, cache)


def packed_layers(patcher: Any, model: Any) -> dict[str, Any]:
    return dict(model.packed_modules(patcher.model))


def change_of(lora: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return STRENGTH * lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]


def bytes_of(patcher: Any, model: Any) -> dict[str, torch.Tensor]:
    return {name: layer.weight._qdata.clone() for name, layer in packed_layers(patcher, model).items()}


def share(text: str) -> float:
    return float(text) / 100


@pytest.mark.parametrize(("format", "error"), WRITTEN)
def test_baked_weights_and_the_reported_error(format: str, error: float, twins: Any, model: Any) -> None:
    packed, dense = twins("sd3", format).load()
    before, plain = bytes_of(packed, model), model.run(packed, load=True)
    lora = model.make_lora(packed.model, 1)
    patched = model.with_lora(packed, lora, STRENGTH)
    load_whole(patched)
    new, report = set_mode(patched, BAKE)
    assert new.patches == {}
    sums = {"rounding": 0.0, "merged": 0.0, "change": 0.0}
    shares = {}
    for name, layer in packed_layers(new, model).items():
        assert layer.weight.params.format == packed_layers(packed, model)[name].weight.params.format
        original = packed.model.get_submodule(name).dense_weight(dtype=torch.float32)
        change = change_of(lora, name)
        merged = original + change
        rounding = layer.dense_weight(dtype=torch.float32) - merged
        found = {"rounding": rounding, "merged": merged, "change": change}
        for part, values in found.items():
            sums[part] += values.square().sum().item()
        shares[name] = (rounding.norm() / change.norm()).item()
        assert rounding.norm() / merged.norm() < error
    pattern = r"{}: ([\d.]+)% of the weights, ([\d.]+)% of the LoRA's change"
    totals = re.search(pattern.format("rounding"), report)
    assert totals
    assert share(totals[1]) == pytest.approx((sums["rounding"] / sums["merged"]) ** 0.5, abs=1e-4)
    assert share(totals[2]) == pytest.approx((sums["rounding"] / sums["change"]) ** 0.5, abs=1e-3)
    worst = re.search(pattern.format(max(shares, key=lambda name: shares[name])), report)
    assert worst and share(worst[2]) == pytest.approx(max(shares.values()), abs=1e-3)
    assert report.startswith(f"LoRA mode: bake in; {len(shares)} layers baked")

    wanted = model.run(model.with_lora(dense, lora, STRENGTH), load=True)
    change = wanted - model.run(dense, load=True)
    for load in LOADS:
        load(new)
        assert model.relative_error(model.run(new), wanted) < 3 * error
        new.detach()
    more = model.make_lora(packed.model, 2)
    stacked = model.run(model.with_lora(new, more, STRENGTH), load=True) - model.run(new, load=True)
    assert stacked.norm() > change.norm() / 10
    assert bytes_of(packed, model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in bytes_of(packed, model).items())
    assert torch.equal(model.run(packed, load=True), plain)
    assert model.relative_error(model.run(patched, load=True), wanted) < 1e-4


@pytest.mark.parametrize("format", ["IQ3_S", "fp8-blocks"])
def test_formats_that_are_only_read_keep_their_lora(format: str, twins: Any, model: Any) -> None:
    packed, _ = twins("sd3", format).load()
    lora = model.make_lora(packed.model, 1)
    patched = model.with_lora(packed, lora, STRENGTH)
    wanted = model.run(patched, load=True)
    new, report = set_mode(patched, BAKE)
    only_read = {
        f"{name}.weight"
        for name, layer in packed_layers(packed, model).items()
        if layer.weight.params.format not in ("F32", "F16", "BF16")
    }
    assert only_read and set(new.patches) == only_read
    told = re.findall(r"(\d+) layers? in \S+, which Snug reads but does not write", report)
    assert sum(map(int, told)) == len(only_read)
    assert model.relative_error(model.run(new, load=True), wanted) < 2e-3


def test_convolutions_and_other_kinds_are_baked(twins: Any, model: Any) -> None:
    """SD1.5 has blocks that cross rows, and layers whose LoRA is no matrix."""
    packed, dense = twins("sd15", "Q8_0").load()
    lora = model.make_lora(packed.model, 1)
    shapes = {name: tuple(layer.weight.shape) for name, layer in packed_layers(packed, model).items()}
    import comfy.sd

    def patched(patcher: Any) -> Any:
        clone = model.with_lora(patcher, lora, STRENGTH)
        return comfy.sd.load_lora_for_models(clone, None, make_adapter("DoRA", shapes), STRENGTH, 0)[0]

    new, _ = set_mode(patched(packed), BAKE)
    assert new.patches == {}
    wanted = model.run(patched(dense), load=True)
    assert model.relative_error(model.run(new, load=True), wanted) < 0.05


def test_weights_that_layers_share(sd3: Any, model: Any) -> None:
    packed, _ = sd3
    lora = model.make_lora(packed.model, 1)
    first, second = (f"diffusion_model.joint_blocks.{n}.x_block.mlp.fc1" for n in (0, 1))
    packed.model.get_submodule(second).weight = packed.model.get_submodule(first).weight
    patched = model.with_lora(packed, lora, STRENGTH)
    new, report = set_mode(patched, BAKE)
    assert set(new.patches) == {f"{first}.weight", f"{second}.weight"}
    assert "2 layers that share one weight: their LoRA is merged while dequantizing" in report
    assert new.model.get_submodule(first).weight is new.model.get_submodule(second).weight
    wanted = model.run(patched, load=True)
    assert model.relative_error(model.run(new, load=True), wanted) < 0.3


def test_baking_can_be_cancelled(sd3: Any, model: Any) -> None:
    import comfy.model_management as management

    patched = model.with_lora(sd3[0], model.make_lora(sd3[0].model, 1))
    before = model.run(patched, load=True)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        set_mode(patched, BAKE)
    assert torch.equal(model.run(patched, load=True), before)


def test_other_models_make_room_on_a_gpu(sd3: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as management
    from snug.nodes.adapter.lora_bake import make_room

    asked: list[tuple[float, str]] = []
    monkeypatch.setattr(
        management, "free_memory", lambda nbytes, device, **_: asked.append((nbytes, device.type))
    )
    largest = max(layer.weight.numel() for layer in packed_layers(sd3[0], model).values())
    for kind in ("cpu", "cuda"):
        make_room(sd3[0].model, torch.device(kind))
    assert asked == [(largest * 24, "cuda")]


# ---- ComfyUI's plain float8 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT8)
def test_cores_plain_float8(dtype: torch.dtype, twins: Any, model: Any) -> None:
    """Core rounds the merged weight to float8; the modes do not."""
    import comfy.sd

    path = str(twins("sd3", "Q4_0").dense)
    float8 = comfy.sd.load_diffusion_model(path, model_options={"dtype": dtype})
    plain = model.run(float8, load=True)
    lora = model.make_lora(set_mode(float8, MERGE)[0].model, 1)
    lora = {name: value * (0.05 if "lora_up" in name else 1) for name, value in lora.items()}
    dense = comfy.sd.load_diffusion_model(path)
    for name, value in float8.model.named_parameters():
        dense.model.get_parameter(name).copy_(value)
    change = model.run(model.with_lora(dense, lora), load=True) - model.run(dense, load=True)
    core = model.run(model.with_lora(float8, lora), load=True) - plain
    assert model.relative_error(core, change) > 0.1, "core does not lose anything here"
    set_mode(float8, MERGE)  # unloads it: the merged weights are gone
    pointers = {name: value.data_ptr() for name, value in float8.model.named_parameters()}
    for mode in ("automatic", MERGE, BRANCH):
        new, _ = set_mode(float8, mode)
        for name, layer in packed_layers(new, model).items():
            assert layer.weight._qdata.data_ptr() == pointers[f"{name}.weight"]
        assert torch.equal(model.run(new, load=True), plain)
        for load in LOADS:
            patched = model.with_lora(new, lora)
            load(patched)
            assert model.relative_error(model.run(patched) - plain, change) < 1e-2, (mode, load.__name__)
            patched.detach()
        before = set_mode(model.with_lora(float8, lora), mode)[0]
        assert model.relative_error(model.run(before, load=True) - plain, change) < 1e-2
    baked, report = set_mode(model.with_lora(float8, lora), BAKE)
    assert baked.patches == {} and " layers baked" in report
    assert torch.equal(model.run(float8, load=True), plain)


def test_cores_own_quantized_layers_are_left(twins: Any, model: Any) -> None:
    import comfy.sd

    source = comfy.sd.load_diffusion_model(str(twins("sd3", "fp8").gguf))
    lora = model.make_lora(twins("sd3", "Q4_0").load()[0].model, 1)
    patched = model.with_lora(source, lora)
    wanted = model.run(patched, load=True)
    for mode in (BRANCH, BAKE):
        new, report = set_mode(patched, mode)
        assert "in a quantized format of ComfyUI's own" in report
        assert set(new.patches) == set(patched.patches)
        assert model.relative_error(model.run(new, load=True), wanted) < 1e-2


# ---- the report -------------------------------------------------------------------------------------------------


def test_report(sd3: Any, model: Any) -> None:
    from snug.nodes.lora_mode import SnugLoraMode

    packed, dense = sd3
    layers = packed_layers(packed, model)
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    attention = {name: shape for name, shape in shapes.items() if ".attn." in name}
    rest = {name: shape for name, shape in shapes.items() if name not in attention}
    import comfy.sd

    patched = model.with_lora(
        packed, {k: v for k, v in model.make_lora(packed.model, 1, 8).items() if ".attn." in k}
    )
    loha = make_adapter("LoHa", rest)
    patched, _ = comfy.sd.load_lora_for_models(patched, None, loha, 1.0, 0)
    others = len(patched.patches) - len(attention)
    _, report = SnugLoraMode.execute(patched, "automatic", True).args
    assert f"{len(patched.patches)} quantized layers with LoRA: " in report
    assert f"{len(attention)} with LoRA" in report and f"{others} with LoHa" in report
    assert f"{len(attention)} of them can take a side branch, rank 8" in report
    merge = sum(2 * 8 * rows * columns for rows, columns in attention.values())
    branch = sum(2 * 1000 * 8 * (rows + columns) for rows, columns in attention.values())
    assert f"{merge / 1e9:,.2f} GFLOP per step, and passes" in report
    assert f"{branch / 1e9:,.2f} GFLOP per step and 1,000 tokens" in report
    factors = sum(
        t.nbytes
        for key in patched.patches
        for p in patched.patches[key]
        for t in p[1].weights
        if isinstance(t, torch.Tensor)
    )
    assert f"{factors / 2**20:,.1f} MB of factors" in report
    kept = 4 * sum(
        shapes[key.removesuffix(".weight")][0] * shapes[key.removesuffix(".weight")][1]
        for key in patched.patches
        if key.removesuffix(".weight") in rest
    )
    assert f"kept merged: up to {kept / 2**20:,.1f} MB" in report
    assert "none (off)" in set_mode(patched, "automatic", False)[1]
    assert "no LoRA here" in set_mode(packed, BRANCH)[1]
    assert "changes nothing" in set_mode(dense, BRANCH)[1]
    assert "behind the LoRA nodes to bake them in" in set_mode(packed, BAKE)[1]
    assert "behind the LoRA nodes" not in set_mode(patched, BAKE)[1]
    assert (
        "patched weights are not quantized"
        in set_mode(model.with_lora(dense, model.make_lora(packed.model, 1)), BRANCH)[1]
    )
