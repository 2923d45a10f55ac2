"""Loading through the adapter: dtype choices, core's own files, errors that name the file and the way out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_folders import save_folder
from diffusers_models import tiny_diffusers_model
from safetensors.torch import load_file, save_file


def load(path: Path, *args: Any) -> Any:
    from snug.nodes.adapter.loading import load_diffusion_model

    return load_diffusion_model(str(path), *args)


@pytest.mark.parametrize(
    "name,dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("kind", ["gguf", "dense"])
def test_compute_dtype(kind: str, name: str, dtype: torch.dtype, twins: Any, model: Any) -> None:
    """The layers calculate in the chosen dtype, whatever the weights are stored in."""
    import comfy.model_management

    patcher = load(getattr(twins("sd3", "Q4_0"), kind), name)
    comfy.model_management.load_models_gpu([patcher])
    seen = set()
    layer = patcher.model.diffusion_model.joint_blocks[0].x_block.mlp.fc1
    layer.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    assert model.run(patcher).isfinite().all()
    assert seen == {(dtype, dtype)}
    if kind == "gguf":
        assert {module.weight.dtype for _, module in model.packed_modules(patcher.model)} == {dtype}


@pytest.mark.parametrize("family,format", [("sd3", "Q4_0"), ("sd15", "Q8_0"), ("sd3", "nf4")])
def test_unloading_as_comfyui_does_on_request(family: str, format: str, twins: Any, model: Any) -> None:
    """It loads and runs models in inference mode, but its button "Unload Models" unloads them outside of it."""
    import comfy.model_management

    with torch.inference_mode():
        patcher = load(twins(family, format).gguf)
        first = model.run(patcher, load=True)
    comfy.model_management.unload_all_models()
    with torch.inference_mode():
        assert torch.equal(model.run(patcher, load=True), first)
    comfy.model_management.unload_all_models()
    assert torch.equal(model.run(patcher, load=True), first)


def test_core_loads_dense_safetensors(twins: Any, model: Any) -> None:
    patcher = load(twins("sd3", "Q4_0").dense)
    assert list(model.packed_modules(patcher.model)) == []
    assert patcher.cached_patcher_init is not None


def test_factory_builds_the_same_model_again(sd3: Any, model: Any) -> None:
    factory, arguments = sd3[0].cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert not getattr(again, "is_dynamic", lambda: False)()
    assert torch.equal(model.run(again, load=True), model.run(sd3[0], load=True))


def test_progress_reaches_the_end(twins: Any) -> None:
    import comfy.utils

    seen: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: seen.append((value, total))
    )
    try:
        load(twins("sd3", "Q4_0").gguf)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert len(seen) >= 2  # newer ComfyUI sends the first and the last, and what lies between not too often
    assert seen[-1][0] == seen[-1][1]
    assert [value for value, _ in seen] == sorted(value for value, _ in seen)


def write(path: Path, tensors: dict[str, torch.Tensor], architecture: str) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unknown_architecture_is_named_with_what_to_do(tmp_path: Path) -> None:
    from snug.quant_backends.core.errors import FileFormatError

    path = write(tmp_path / "new.gguf", {"layer.0.weight": torch.zeros(8, 8)}, "novelty")
    with pytest.raises(FileFormatError, match=r"new\.gguf.*'novelty'.*none of the models.*update ComfyUI"):
        load(path)


def test_unknown_architecture_name_does_not_matter(twins: Any, tmp_path: Path, model: Any) -> None:
    """general.architecture is only a hint: a file that names something else loads all the same."""
    source = twins("sd3", "Q4_0").gguf
    data = source.read_bytes()
    assert data.count(b"\x03\0\0\0\0\0\0\0sd3") == 1
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(data.replace(b"\x03\0\0\0\0\0\0\0sd3", b"\x03\0\0\0\0\0\0\0xyz"))
    assert torch.equal(model.run(load(renamed), load=True), model.run(load(source), load=True))


def test_wrong_shape_is_one_sentence(twins: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from snug.quant_backends.core.errors import FileFormatError

    tensors = load_file(twins("sd3", "Q4_0").dense)
    name = "joint_blocks.1.x_block.mlp.fc2.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    path = write(tmp_path / "misshapen.gguf", tensors, "sd3")
    with pytest.raises(FileFormatError, match=r"misshapen\.gguf.*do not fit.*mlp\.fc2\.weight") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_missing_file(comfy: Any) -> None:
    from snug.nodes.adapter.folders import find_diffusion_model
    from snug.quant_backends.core.errors import SnugError

    with pytest.raises(SnugError, match=r"'gone\.gguf' was not found in .*press R"):
        find_diffusion_model("gone.gguf")


@pytest.mark.parametrize("name", ["gone.gguf", "gone.safetensors"])
def test_a_file_that_went_after_it_was_chosen(name: str, sd3: Any, comfy: Any, tmp_path: Path) -> None:
    """As ComfyUI builds a model again, or between choosing and loading."""
    from snug.nodes.adapter.checkpoints import load_checkpoint
    from snug.nodes.adapter.controlnets import load_controlnet
    from snug.nodes.adapter.loading import load_diffusion_model
    from snug.nodes.adapter.loras import apply_lora
    from snug.quant_backends.core.errors import FileFormatError

    path = str(tmp_path / name)
    loaders: tuple[Any, ...] = (load_diffusion_model, load_checkpoint, load_controlnet)
    for load_it in (*loaders, lambda path: apply_lora(sd3[0], None, path, 1.0, 1.0)):
        with pytest.raises(FileFormatError, match=r"gone.*cannot be opened"):
            load_it(path)


def test_out_of_memory_is_not_blamed_on_the_file(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI frees all models when it sees this error."""
    import comfy.sd

    def fail(*_: Any, metadata: Any = None, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", fail)
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", fail)
    for path in (twins("sd3", "Q4_0").gguf, twins("sd3", "Q4_0").dense):
        with pytest.raises(torch.OutOfMemoryError):
            load(path)


def test_a_name_from_another_node_does_not_reload_the_model(comfy: Any) -> None:
    """ComfyUI asks with None while it is not known; an exception would count as a change on every run."""
    from snug.nodes.load_diffusion_model import SnugLoadDiffusionModel

    ask = SnugLoadDiffusionModel.fingerprint_inputs
    assert ask(model_name=None, compute_dtype="auto") == ask(model_name=None, compute_dtype="auto")


def test_a_packed_weight_that_a_model_reads_itself(comfy: Any, tmp_path: Path) -> None:
    """AuraFlow's norms have a 2-D weight, which converters quantize, outside of ComfyUI's operations."""
    import gguf
    from comfy.ldm.aura.mmdit import MultiHeadLayerNorm
    from snug.quant_backends.readers import load_diffusion_gguf

    path = tmp_path / "aura.gguf"
    name = "double_layers.0.attn.q_norm1.weight"
    writer = gguf.GGUFWriter(path, "aura")
    writer.add_tensor(
        name,
        gguf.quantize(torch.ones(12, 256).numpy(), gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    norm = MultiHeadLayerNorm((12, 256))
    norm.load_state_dict({"weight": load_diffusion_gguf(path).state_dict[name]})
    assert torch.allclose(norm.weight, torch.ones(12, 256), atol=0.01)


def test_one_file_of_one_is_a_file_like_any_other(twins: Any, tmp_path: Path, model: Any) -> None:
    files = twins("sd3", "nf4")
    alone = tmp_path / "model-00001-of-00001.safetensors"
    shutil.copy(files.gguf, alone)
    assert torch.equal(model.run(load(alone), load=True), model.run(load(files.gguf), load=True))


def test_one_file_of_several_elsewhere(twins: Any, comfy: Any, tmp_path: Path) -> None:
    """What it lacks would be left at zero."""
    from snug.nodes.adapter.checkpoints import load_checkpoint
    from snug.nodes.adapter.controlnets import load_controlnet
    from snug.nodes.adapter.text_encoders import load_text_encoders
    from snug.quant_backends.core.errors import FileFormatError

    part = str(shutil.copy(twins("sd3", "nf4").gguf, tmp_path / "model-00002-of-00003.safetensors"))
    for load_it in (load_checkpoint, load_controlnet, lambda path: load_text_encoders([path], "sd3")):
        with pytest.raises(FileFormatError, match="only one part of a model in several files"):
            load_it(part)


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "model.", "net.", "diffusion_model.", "transformer.", "unet."]
)
def test_prefixes_of_names(prefix: str, twins: Any, tmp_path: Path, model: Any) -> None:
    files = twins("sd3", "nf4")
    tensors = {prefix + name: value for name, value in load_file(files.gguf).items()}
    save_file(tensors, tmp_path / "prefixed.safetensors")
    found = model.run(load(tmp_path / "prefixed.safetensors"), load=True)
    assert torch.equal(found, model.run(load(files.gguf), load=True))


def test_one_file_of_a_split_model_stands_for_its_folder(comfy: Any, tmp_path: Path, model: Any) -> None:
    from snug.nodes.adapter.loading import load_diffusion_model
    from snug.quant_backends.core.errors import FileFormatError

    save_folder(tiny_diffusers_model("sd3"), tmp_path, shard_bytes=1 << 20)
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    whole = load_diffusion_model(str(tmp_path))
    assert torch.equal(
        model.run(load_diffusion_model(str(shards[1])), load=True), model.run(whole, load=True)
    )
    shards[-1].unlink()
    with pytest.raises(FileFormatError, match=shards[-1].name):
        load_diffusion_model(str(shards[1]))
