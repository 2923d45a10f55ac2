"""Layers as a compiler should see them: what their weights are and where they are is no part of the graph.

torch.compile guards on everything that it traces through. A layer of ComfyUI traced as it is would be compiled again
whenever a LoRA is added or its strength changes, when weights are offloaded or come back, and for each quantized
format. So while compiled code runs, layers with weights take a `forward` that is an operation of torch: its inputs are
the activations and the number under which the layer is known here, and inside it the layer runs as it always does.
The shape of the result is all that the compiler knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F

from .layout import is_packed
from .offload_streaming import LayerForward, bring
from .packed_module import PackedWeightModule

# ---- operations ------------------------------------------------------------------------------------------------


@torch.compiler.disable
def _linear(x: torch.Tensor, number: torch.Tensor, features: int) -> torch.Tensor:
    """x [..., in] through layer `number` (int64 scalar on the CPU); returns [..., features] in x's dtype."""
    opaque = _in_use[int(number)]
    bring(opaque.layer)
    return opaque.eager(x).contiguous()


def _linear_shape(x: torch.Tensor, number: torch.Tensor, features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], features))


@torch.compiler.disable
def _rows(ids: torch.Tensor, number: torch.Tensor, features: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the table in layer `number`, for ids [...]; returns [..., features] in `dtype`."""
    opaque = _in_use[int(number)]
    bring(opaque.layer)
    return opaque.eager(ids, out_dtype=dtype).to(dtype).contiguous()


def _rows_shape(ids: torch.Tensor, number: torch.Tensor, features: int, dtype: torch.dtype) -> torch.Tensor:
    return ids.new_empty((*ids.shape, features), dtype=dtype)


@torch.compiler.disable
def _weight_and_bias(
    x: torch.Tensor, number: torch.Tensor, weight_shape: list[int], bias_shape: list[int] | None
) -> list[torch.Tensor]:
    """Weight and, where there is one, bias of layer `number` as it uses them on x: x's device and dtype.

    Always copies, as a compiler may reuse the memory of an operation's result.
    """
    layer = _in_use[int(number)].layer
    bring(layer)
    with _cast(layer, x) as (weight, bias):
        if is_packed(weight) or (isinstance(layer, PackedWeightModule) and layer.patched()):
            found = [layer.dense_weight(weight, x.dtype)]
        else:
            found = [weight.to(x.dtype, memory_format=torch.contiguous_format, copy=True)]
        if bias is not None:
            found.append(bias.to(x.dtype, copy=True))
    return found


@contextmanager
def _cast(layer: Any, x: torch.Tensor) -> Iterator[tuple[Any, torch.Tensor | None]]:
    """Weight and bias on x's device, given back to ComfyUI afterwards; packed ones stay so in any dtype."""
    if isinstance(layer, PackedWeightModule):
        with layer.cast_weight(x) as found:
            yield found
        return
    weight, bias, token = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, token)


def _weight_and_bias_shapes(
    x: torch.Tensor, number: torch.Tensor, weight_shape: list[int], bias_shape: list[int] | None
) -> list[torch.Tensor]:
    found = [x.new_empty(weight_shape)]
    return found if bias_shape is None else [*found, x.new_empty(bias_shape)]


def _register(schema: str, function: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    # torch.library.custom_op would do the same at a higher cost per call.
    name, _, _ = schema.partition("(")
    # A CUDA graph would replay the weights and patches of the moment when it was recorded.
    tags = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)
    _library.define(schema, tags=tags)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"snug::{name}", shapes, lib=_library)


# Attribute of the operation: the layers in compiled code that is running now, by number.
_TABLE = "snug_layers"

# The pack may be imported twice under different names; an operation can be registered once, and its layers are
# found where the first import has put them.
if not hasattr(torch.ops.snug, "layer_linear"):
    _library = torch.library.Library("snug", "FRAGMENT")
    _register("layer_linear(Tensor x, Tensor number, int features) -> Tensor", _linear, _linear_shape)
    _register(
        "layer_rows(Tensor ids, Tensor number, int features, ScalarType dtype) -> Tensor", _rows, _rows_shape
    )
    _register(
        "layer_weights(Tensor x, Tensor number, int[] weight_shape, int[]? bias_shape) -> Tensor[]",
        _weight_and_bias,
        _weight_and_bias_shapes,
    )
    setattr(torch.ops.snug.layer_linear, _TABLE, {})
_in_use: dict[int, Opaque] = getattr(torch.ops.snug.layer_linear, _TABLE)


# ---- what layers run instead of their forward ------------------------------------------------------------------


class Opaque(torch.nn.Module):
    """Stands for the forward of `layer` while compiled code runs. A module, whose ints are constants to the compiler.

    number: what the operations know it by, as a tensor: an int would be a constant of the graph, and every block
    would be compiled for itself. eager: the layer's forward as it was, another node's included.
    """

    layer: Any

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.number = torch.tensor(id(self), dtype=torch.int64)
        self.eager: Callable[..., torch.Tensor] = layer.forward


class OpaqueLinear(Opaque):
    """The whole layer is one operation: a matmul gains nothing from being traced."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        return torch.ops.snug.layer_linear.default(input, self.number, layer.out_features)


class OpaqueEmbedding(Opaque):
    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.dtype = layer.weight.dtype

    def forward(self, input: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        width = self.layer.embedding_dim
        return torch.ops.snug.layer_rows.default(input, self.number, width, out_dtype or self.dtype)


class OpaqueWeights(Opaque):
    """Only the weights come from an operation; what is done with them is traced, and fused with its neighbours."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.weight_shape = None if layer.weight is None else list(layer.weight.shape)
        self.bias_shape = None if layer.bias is None else list(layer.bias.shape)

    def weights(
        self, input: torch.Tensor, weight_shape: list[int] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        shape = weight_shape or self.weight_shape
        if shape is None:
            return None, None
        found = torch.ops.snug.layer_weights.default(input, self.number, shape, self.bias_shape)
        return found[0], found[1] if len(found) == 2 else None


class OpaqueConv(OpaqueWeights):
    def forward(self, input: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        layer = self.layer
        # LoRAs for inpainting and the like add channels to the weight, and to the input with it.
        channels = input.shape[-1 - len(layer.kernel_size)] // layer.groups
        weights = self.weights(input, [layer.out_channels, channels, *layer.kernel_size])
        return layer._conv_forward(input, *weights, *args, **options)


class OpaqueConvTranspose(OpaqueWeights):
    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        layer = self.layer
        dims = len(layer.kernel_size)
        padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
        )
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d)[dims - 1]
        return convolve(
            input, *self.weights(input), layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )


class OpaqueLayerNorm(OpaqueWeights):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        return F.layer_norm(input, layer.normalized_shape, *self.weights(input), layer.eps)


class OpaqueGroupNorm(OpaqueWeights):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        return F.group_norm(input, layer.num_groups, *self.weights(input), layer.eps)


class OpaqueRMSNorm(OpaqueWeights):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        return F.rms_norm(input, layer.normalized_shape, self.weights(input)[0], layer.eps)


_KINDS: tuple[tuple[tuple[type, ...], type[Opaque]], ...] = (
    ((torch.nn.Embedding,), OpaqueEmbedding),
    ((torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d), OpaqueConvTranspose),
    ((torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d), OpaqueConv),
    ((torch.nn.LayerNorm,), OpaqueLayerNorm),
    ((torch.nn.GroupNorm,), OpaqueGroupNorm),
    ((torch.nn.RMSNorm,), OpaqueRMSNorm),
)


def opaque_layers(module: torch.nn.Module) -> Iterator[Opaque]:
    """A stand-in for each layer under `module` whose weights ComfyUI may move or patch."""
    for layer in module.modules():
        if not hasattr(layer, "comfy_cast_weights"):  # no layer of ComfyUI's operations
            continue
        if hasattr(layer, "out_features"):
            yield OpaqueLinear(layer)
            continue
        for classes, kind in _KINDS:
            if isinstance(layer, classes):
                yield kind(layer)


@contextmanager
def replaced_forwards(stand_ins: Iterable[Opaque]) -> Iterator[None]:
    """Lets layers run their stand-ins, until the end of the block."""
    replaced: list[tuple[Opaque, Any]] = []
    try:
        for opaque in stand_ins:
            attributes = opaque.layer.__dict__
            previous = attributes.get("forward")
            foreign = previous is not None and not isinstance(previous, LayerForward)
            if foreign and not isinstance(opaque, OpaqueLinear):
                continue  # another node has replaced what would be traced
            opaque.eager = opaque.layer.forward
            replaced.append((opaque, previous))
            _in_use[id(opaque)] = opaque
            attributes["forward"] = opaque.forward
        yield
    finally:
        for opaque, previous in reversed(replaced):
            del _in_use[id(opaque)]
            if previous is None:
                del opaque.layer.__dict__["forward"]
            else:
                opaque.layer.__dict__["forward"] = previous


def runs_stand_in(module: object) -> bool:
    """Whether `module` is a layer whose forward is replaced at the moment."""
    forward = getattr(module, "__dict__", {}).get("forward")
    return isinstance(getattr(forward, "__self__", None), Opaque)
