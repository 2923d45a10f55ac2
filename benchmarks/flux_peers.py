"""Flux with its layers replaced by those of other libraries, each where it is installed and runs on the device.

The blocks, their attention and everything else stay ComfyUI's; only the linear layers inside of blocks are the
library's own, with the weights of the model that is given.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def peer_names() -> list[str]:
    return list(_MAKERS)


def peer(patcher: Any, name: str) -> Any:
    """A copy of a MODEL's module with a library's layers; ImportError, RuntimeError and the like where there is none.

    The patcher must not be loaded by ComfyUI afterwards in another place: the copy holds weights of its own.
    """
    model = copy.copy(patcher.model)
    model.__dict__["_modules"] = dict(model._modules)
    network = copy.deepcopy(patcher.model.diffusion_model)
    model.diffusion_model = network
    dtype = patcher.model.get_dtype_inference() if hasattr(patcher.model, "get_dtype_inference") else None
    for block in (*network.double_blocks, *network.single_blocks):
        for parent, key, layer in list(linear_layers(block)):
            parent._modules[key] = plain_linear(layer, dtype)
        _MAKERS[name](block)
    return model


def linear_layers(block: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """(module, name in it, layer) of every linear layer."""
    for parent in block.modules():
        for key, layer in parent._modules.items():
            if isinstance(layer, torch.nn.Linear):
                yield parent, key, layer


def plain_linear(layer: torch.nn.Linear, dtype: torch.dtype | None) -> torch.nn.Linear:
    """torch's own layer with the same weights, in the dtype that ComfyUI would cast them to."""
    dtype = dtype or layer.weight.dtype
    new = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta", dtype)
    for name, value in layer.named_parameters():
        # A copy: ComfyUI's were made in inference mode, which libraries do not expect.
        copied = value.detach().to(dtype, copy=True)
        setattr(new, name, torch.nn.Parameter(copied, requires_grad=False))
    return new


def _each(change: Callable[[torch.nn.Linear], torch.nn.Module]) -> Callable[[torch.nn.Module], None]:
    def make(block: torch.nn.Module) -> None:
        for parent, key, layer in list(linear_layers(block)):
            parent._modules[key] = change(layer)

    return make


def _bnb_4bit(layer: torch.nn.Linear) -> torch.nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    weight = layer.weight
    new = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
    )
    new.weight = bnb.nn.Params4bit(weight.data.cpu(), requires_grad=False, quant_type="nf4")
    new.bias = layer.bias
    return new.to(weight.device)


def _bnb_8bit(layer: torch.nn.Linear) -> torch.nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    new = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
    )
    new.weight = bnb.nn.Int8Params(
        layer.weight.data.cpu().half(), requires_grad=False, has_fp16_weights=False
    )
    new.bias = layer.bias
    return new.to(layer.weight.device)


def _torchao(config: str, **options: Any) -> Callable[[torch.nn.Module], None]:
    def make(block: torch.nn.Module) -> None:
        torchao = importlib.import_module("torchao.quantization")
        torchao.quantize_(block, getattr(torchao, config)(**options))

    return make


def _quanto(kind: str) -> Callable[[torch.nn.Module], None]:
    def make(block: torch.nn.Module) -> None:
        quanto = importlib.import_module("optimum.quanto")
        quanto.quantize(block, weights=getattr(quanto, kind))
        quanto.freeze(block)

    return make


def _diffusers_gguf(name: str) -> Callable[[torch.nn.Module], None]:
    def change(layer: torch.nn.Linear) -> torch.nn.Module:
        utils = importlib.import_module("diffusers.quantizers.gguf.utils")
        gguf = importlib.import_module("gguf")
        kernels = importlib.import_module("snug.quant_backends.kernels.dequantize")
        formats = importlib.import_module("snug.quant_backends.formats")
        packed = kernels.quantize(layer.weight.detach().float(), formats.FORMATS[name])
        new = utils.GGUFLinear(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype
        )
        new.weight = utils.GGUFParameter(packed, quant_type=gguf.GGMLQuantizationType[name])
        new.bias = layer.bias
        return new

    return _each(change)


_MAKERS: dict[str, Callable[[torch.nn.Module], None]] = {
    "torch nn.Linear": lambda block: None,
    "bitsandbytes NF4": _each(_bnb_4bit),
    "bitsandbytes INT8": _each(_bnb_8bit),
    "torchao INT8 weight-only": _torchao("Int8WeightOnlyConfig", set_inductor_config=False),
    "torchao FP8 weight-only": _torchao("Float8WeightOnlyConfig", set_inductor_config=False),
    "torchao INT4 weight-only": _torchao("Int4WeightOnlyConfig", set_inductor_config=False),
    "torchao INT8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig", set_inductor_config=False),
    "quanto qint8": _quanto("qint8"),
    "quanto qint4": _quanto("qint4"),
    "quanto qfloat8": _quanto("qfloat8"),
    **{f"diffusers GGUF {name}": _diffusers_gguf(name) for name in ("Q8_0", "Q4_0", "Q4_K")},
}
