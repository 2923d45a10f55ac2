"""Layerwise casting equals the dense model with the same rounded weights, and never touches the given model."""

from __future__ import annotations

import gc
import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_states import LOADS, load_nothing, load_whole
from safetensors.torch import load_file, save_file
from small_text_encoders import PROMPT, SmallCLIP, load_dense

STORAGE = ["float8_e4m3fn per row", "float8_e4m3fn", "float8_e5m2 per row", "float8_e5m2"]
ROWS = STORAGE[0]
# Largest part of the prediction that the rounding of a tiny model's weights may change.
CHANGES = {"e4m3fn": 0.1, "e5m2": 0.2}


def cast(patcher: Any, storage: str = ROWS, dtype: str = "auto", skip: str = "default") -> tuple[Any, str]:
    from snug.nodes.adapter.layerwise_casting import cast_model

    return cast_model(patcher, storage, dtype, skip)


def rounded(weight: torch.Tensor, storage: str) -> torch.Tensor:
    """What the weight becomes, by torch's own cast."""
    dtype = getattr(torch, storage.split()[0])
    if "row" not in storage:
        return weight.to(dtype).to(weight.dtype)
    scale = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1)) / torch.finfo(dtype).max
    return (weight / scale).to(dtype).float() * scale


def round_in_place(dense: Any, names: list[str], storage: str) -> None:
    for name in names:
        layer = dense.model.get_submodule(name)
        layer.weight = torch.nn.Parameter(rounded(layer.weight.detach(), storage), requires_grad=False)


def tensors_of(patcher: Any) -> dict[str, Any]:
    return dict(patcher.model.named_parameters()) | dict(patcher.model.named_buffers())


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(("family", "format"), [("sd3", "Q4_0"), ("sd15", "Q8_0")])
def test_equals_the_rounded_dense_model(
    family: str, format: str, storage: str, twins: Any, model: Any
) -> None:
    _, dense = twins(family, format).load()
    before = model.run(dense, load=True)
    tensors = tensors_of(dense)
    new, report = cast(dense, storage)
    names = [name for name, _ in model.packed_modules(new.model)]
    found = model.run(new, load=True)
    assert {id(tensor) for tensor in tensors.values()} == {
        id(tensor) for tensor in tensors_of(dense).values()
    }
    assert torch.equal(model.run(dense, load=True), before), "the given model has changed"
    _, other = twins(family, format).load()
    round_in_place(other, names, storage)
    wanted = model.run(other, load=True)
    assert model.relative_error(found, wanted) < 1e-5
    assert 1e-3 < model.relative_error(found, before) < CHANGES["e5m2" if "e5m2" in storage else "e4m3fn"]
    assert f"{len(names)} layers cast to {storage}" in report


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("first", ["lora", "casting"])
def test_lora_before_and_after(first: str, load: Callable[[Any], None], twins: Any, model: Any) -> None:
    _, dense = twins("sd3", "Q4_0").load()
    load_nothing(dense)  # leaves its mark on layers, which must not come along
    dense.detach()
    plain, _ = cast(dense)
    lora = model.make_lora(plain.model, 1)
    names = [name for name, _ in model.packed_modules(plain.model)]
    if first == "lora":
        load_whole(model.with_lora(dense, lora))  # merged into its weights when the casting comes
        new, _ = cast(model.with_lora(dense, lora))
    else:
        new = model.with_lora(plain, lora)
    load(new)
    found = model.run(new)
    new.detach()
    before = model.run(plain, load=True)
    round_in_place(dense, names, ROWS)
    change = model.run(model.with_lora(dense, lora), load=True) - model.run(dense, load=True)
    assert change.abs().max() > 0.05
    assert model.relative_error(found - before, change) < 1e-3


def test_two_castings_and_their_source_side_by_side(sd3: Any, model: Any) -> None:
    _, dense = sd3
    runs = [dense, cast(dense)[0], cast(dense, "float8_e5m2", "bf16", "")[0]]
    outputs = [model.run(patcher, load=True) for patcher in runs]
    for _ in range(2):
        for patcher, output in zip(runs, outputs, strict=True):
            assert torch.equal(model.run(patcher, load=True), output)
    assert model.relative_error(outputs[1], outputs[0]) < model.relative_error(outputs[2], outputs[0])


@pytest.mark.parametrize("load", LOADS)
def test_memory_is_counted_and_given_back(load: Callable[[Any], None], sd3: Any, model: Any) -> None:
    import comfy.model_management

    _, dense = sd3
    new, report = cast(dense)
    size = new.model_size()
    packed = sum(
        weight.numel() + 4 * len(weight) for weight in (m.weight for _, m in model.packed_modules(new.model))
    )
    kept = {name.removesuffix(".weight") for name, _ in model.packed_modules(new.model)}
    rest = sum(t.nbytes for name, t in tensors_of(new).items() if name.removesuffix(".weight") not in kept)
    assert size == packed + rest
    assert size < dense.model_size() / 2
    assert f"{(dense.model_size() - size) / 2**20:.1f} MB saved" in report
    for name, tensor in tensors_of(new).items():
        if name.removesuffix(".weight") not in kept:
            assert tensor.data_ptr() == tensors_of(dense)[name].data_ptr(), "what is not cast is shared"
    load(new)
    model.run(new)
    if load is load_whole:
        assert new.loaded_size() == size
    comfy.model_management.unload_all_models()
    new.detach()
    assert new.loaded_size() == 0
    assert comfy.model_management.current_loaded_models == []


def test_quantized_layers_stay(twins: Any, model: Any) -> None:
    for format in ("Q4_0", "nf4", "fp8"):
        packed, _ = twins("sd3", format).load()
        before = {
            name: module.weight._qdata
            for name, module in model.packed_modules(packed.model)
            if module.weight.params.format not in ("F16", "BF16")
        }
        output = model.run(packed, load=True)
        new, report = cast(packed)
        after = {name: module.weight for name, module in model.packed_modules(new.model)}
        for name, data in before.items():
            assert after[name]._qdata.data_ptr() == data.data_ptr()
        assert f"{len(before)} layers were quantized already" in report
        assert model.relative_error(model.run(new, load=True), output) < 0.02
        lora = model.make_lora(packed.model, 1)
        change = model.run(model.with_lora(packed, lora), load=True) - output
        again = model.run(model.with_lora(new, lora), load=True) - model.run(new, load=True)
        assert model.relative_error(again, change) < 0.05


@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_cores_own_float8_stays(weight_dtype: torch.dtype, twins: Any, model: Any) -> None:
    import comfy.sd

    path = str(twins("sd3", "Q4_0").dense)
    float8 = comfy.sd.load_diffusion_model(path, model_options={"dtype": weight_dtype})
    before = model.run(float8, load=True)
    new, report = cast(float8)
    assert report.startswith("0 layers cast")
    assert new.model_size() == float8.model_size()
    assert torch.equal(model.run(new, load=True), before)


def test_cores_own_quantized_layers(twins: Any, model: Any) -> None:
    """Scaled float8 in ComfyUI's own layers; what they hold plain beside it can be cast."""
    import comfy.sd

    source = comfy.sd.load_diffusion_model(str(twins("sd3", "fp8").gguf))
    before = model.run(source, load=True)
    for skip, count, error in (("default", 0, 0.0), ("", 1, 0.03)):
        new, report = cast(source, skip=skip)
        assert report.startswith(f"{count} layers cast")
        assert "44 layers were quantized already" in report
        assert model.relative_error(model.run(new, load=True), before) <= error
        new.detach()
        load_nothing(new)
        assert model.relative_error(model.run(new), before) <= error
        new.detach()
    assert torch.equal(model.run(source, load=True), before)


def test_half_precision_weights_of_the_file_are_cast(
    sd3: Any, twins: Any, model: Any, tmp_path: Path
) -> None:
    """F16 in a GGUF or a wider model is packed as well, but not quantized."""
    half = {name: tensor.half() for name, tensor in load_file(twins("sd3", "Q4_0").dense).items()}
    save_file(half, tmp_path / "half.safetensors")
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model(str(tmp_path / "half.safetensors"))
    packed, _ = twins("sd3", "F16").load()
    for source in (patcher, packed):
        new, report = cast(source)
        assert "0 layers were quantized already" in report
        assert report.startswith("37 layers")
        assert model.relative_error(model.run(new, load=True), model.run(source, load=True)) < 0.05


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_compute_dtype(name: str, dtype: torch.dtype, sd3: Any, model: Any) -> None:
    _, dense = sd3
    wanted = model.run(cast(dense)[0], load=True)
    new, _ = cast(dense, dtype=name)
    inputs: list[torch.dtype] = []
    layer = next(module for _, module in model.packed_modules(new.model))
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    found = model.run(new, load=True)
    assert inputs[0] == dtype
    assert model.relative_error(found.float(), wanted) < (1e-6 if dtype == torch.float32 else 0.05)
    assert dense.object_patches == {}


def test_skip_patterns(sd3: Any, model: Any) -> None:
    from snug.quant_backends.core.errors import SnugError

    _, dense = sd3
    names = {}
    for skip in ("", "default", "default, mlp"):
        names[skip] = [name for name, _ in model.packed_modules(cast(dense, skip=skip)[0].model)]
    assert any("x_embedder" in name for name in names[""])
    assert not any("embedder" in name or "final_layer" in name for name in names["default"])
    assert set(names["default, mlp"]) == {name for name in names["default"] if "mlp" not in name}
    with pytest.raises(SnugError, match="no regular expression"):
        cast(dense, skip="default, (")


def test_saving_is_dense(sd3: Any, model: Any, tmp_path: Path) -> None:
    import comfy.sd

    new, _ = cast(sd3[1])
    lora = model.make_lora(new.model, 1)
    for patcher, file in ((new, "plain"), (model.with_lora(new, lora), "merged")):
        comfy.sd.save_checkpoint(str(tmp_path / f"{file}.safetensors"), patcher)
        again = comfy.sd.load_diffusion_model(str(tmp_path / f"{file}.safetensors"))
        assert model.relative_error(model.run(again, load=True), model.run(patcher, load=True)) < 1e-4


def test_cycles_leave_nothing(twins: Any, model: Any) -> None:
    import comfy.model_management

    _, dense = twins("sd3", "Q4_0").load()
    models, resident = [], []
    for number in range(20):
        new, _ = cast(dense, STORAGE[number % 4])
        models.append(weakref.ref(new.model))
        model.run(new, load=True)
        comfy.model_management.unload_all_models()
        del new
        gc.collect()
        with open("/proc/self/statm") as file:
            resident.append(int(file.read().split()[1]) * resource.getpagesize())
    assert not [reference for reference in models if reference() is not None]
    assert resident[-1] - resident[4] < 8 << 20, [size >> 20 for size in resident]


def test_cancelling_leaves_the_model_alone(sd3: Any, model: Any) -> None:
    import comfy.model_management as management

    _, dense = sd3
    before = model.run(dense, load=True)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        cast(dense)
    assert torch.equal(model.run(dense, load=True), before)


@pytest.mark.parametrize("storage", [ROWS, "float8_e5m2"])
def test_clip(storage: str, comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any) -> None:
    from snug.nodes.adapter.layerwise_casting import cast_clip
    from snug.nodes.layerwise_casting import SnugLayerwiseCastingCLIP

    save_file(SmallCLIP(comfy, monkeypatch).weights("sd1_clip_config.json"), tmp_path / "clip.safetensors")
    clip, other = (load_dense(comfy, tmp_path / "clip.safetensors", "stable_diffusion") for _ in range(2))

    def encode(clip: Any) -> torch.Tensor:
        return clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)[0]

    before = encode(clip)
    new, report = SnugLayerwiseCastingCLIP.execute(clip, storage, "default").args
    assert new.cond_stage_model is new.patcher.model is not clip.cond_stage_model
    names = [name for name, _ in model.packed_modules(new.cond_stage_model)]
    assert len(names) == 72
    assert f"72 layers cast to {storage}" in report
    round_in_place(other.patcher, names, storage)
    assert model.relative_error(encode(new), encode(other)) < 1e-5
    assert torch.equal(encode(clip), before)
    assert model.relative_error(encode(new.clone()), before) > 1e-4
    everything, _ = cast_clip(clip, storage, "")
    assert len(list(model.packed_modules(everything.cond_stage_model))) > len(names)
    assert 1e-4 < model.relative_error(encode(everything), before) < 0.2
    lora = model.make_lora(new.cond_stage_model, 1)
    changes = []
    for target in (new, other):
        patched = target.clone()
        weights = {
            f"{name}.weight": ("diff", (lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"],))
            for name in names
        }
        assert len(patched.add_patches(weights, 0.5)) == len(names)
        changes.append(encode(patched) - encode(target))
    assert changes[1].abs().max() > 0.01
    assert model.relative_error(*changes) < 1e-3
