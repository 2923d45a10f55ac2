"""Folders as diffusers' `save_pretrained` writes them, quantized through diffusers where it can do that on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

State = dict[str, torch.Tensor]

# diffusers refuses to quantize with bitsandbytes without a GPU: its keys are written here.
BITSANDBYTES = ("nf4-nested", "fp4", "int8")
TORCHAO = {"torchao-int8": "Int8WeightOnlyConfig", "torchao-float8": "Float8WeightOnlyConfig"}
QUANTO = {"quanto-int8": "int8", "quanto-float8": "float8", "quanto-int4": "int4", "quanto-int2": "int2"}
FOLDER_KINDS = (*BITSANDBYTES, *TORCHAO, *QUANTO)


def save_folder(model: Any, folder: Path, kind: str | None = None, shard_bytes: int = 1 << 40) -> State:
    """Save a diffusers model to a folder, as `kind` (of FOLDER_KINDS) or as it is, in files of at most `shard_bytes`.

    Returns the weights in it under diffusers' names, as the library that wrote them decodes them.
    """
    if kind is None:
        model.save_pretrained(folder, max_shard_size=shard_bytes)
        return model.state_dict()
    if kind in BITSANDBYTES:
        return _save_bitsandbytes(model, folder, kind, shard_bytes)
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    source = folder.with_name(folder.name + "-dense")
    model.save_pretrained(source)
    if kind in TORCHAO:
        library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        method = getattr(library, TORCHAO[kind])(set_inductor_config=False)
        config = diffusers.TorchAoConfig(method, modules_to_not_convert=["proj_out"])
    else:
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        config = diffusers.QuantoConfig(weights_dtype=QUANTO[kind], modules_to_not_convert=["proj_out"])
    quantized = type(model).from_pretrained(source, quantization_config=config, torch_dtype=model.dtype)
    quantized.save_pretrained(folder, max_shard_size=shard_bytes)
    return _decoded(quantized)


def _decoded(model: Any) -> State:
    """The weights of a model with quantized layers, dense."""
    saved = model.state_dict()
    buffers = {name: value for name, value in model.named_buffers() if name in saved}
    expected = {}
    for name, value in [*model.named_parameters(), *buffers.items()]:
        if name.endswith(("input_scale", "output_scale")):
            continue  # quanto's activations
        is_dense = type(value) in (torch.Tensor, torch.nn.Parameter)
        expected[name] = value.detach() if is_dense else value.dequantize().detach()
    return expected


def _save_bitsandbytes(model: Any, folder: Path, kind: str, shard_bytes: int) -> State:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    from safetensors.torch import save_file

    stored: State = {}
    expected: State = dict(model.state_dict())
    for name, value in model.state_dict().items():
        layer = name.removesuffix(".weight")
        linear = isinstance(model.get_submodule(layer), torch.nn.Linear) if layer != name else False
        if not linear or layer == "proj_out":
            stored[name] = value.contiguous()
        elif kind == "int8":
            stored[name], stored[f"{layer}.SCB"], _ = functional.int8_vectorwise_quant(value.half())
            stored[f"{layer}.weight_format"] = torch.zeros((), dtype=torch.uint8)
            expected[name] = functional.int8_vectorwise_dequant(stored[name], stored[f"{layer}.SCB"])
        else:
            data, state = functional.quantize_4bit(
                value, quant_type=kind[:3], compress_statistics=kind.endswith("nested"), blocksize=64
            )
            stored[name] = data
            stored.update({f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()})
            expected[name] = functional.dequantize_4bit(data, state)

    model.save_config(folder)
    config = json.loads((folder / "config.json").read_text())
    bits = (
        {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind[:3]}
    )
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "llm_int8_skip_modules": ["proj_out"],
        **bits,
    }
    (folder / "config.json").write_text(json.dumps(config))
    plan = hub.split_torch_state_dict_into_shards(
        stored, max_shard_size=shard_bytes, filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
    )
    for filename, names in plan.filename_to_tensors.items():
        save_file({name: stored[name] for name in names}, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return expected
