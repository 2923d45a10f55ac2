"""Undo what the writers of GGUF files do to the names and shapes of diffusion models.

Each function names the writer that makes it necessary. Shapes are repaired before any tensor is made, so
every repair works on `shapes`: tensor name to shape in torch order, changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

from ..core.errors import FileFormatError
from .diffusion_tables import (
    COMPANIONS,
    CONV3D,
    DIFFUSION_PREFIXES,
    LEADING_ONES,
    QK_NORM,
    SD1_CONTEXT_WIDTH,
    UNET_CONTEXT,
    UNET_PROJECTION,
)
from .gguf_file import GGUFFile
from .gguf_tensors import TensorInfo, is_possible
from .gguf_values import shown

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

Shapes = dict[str, tuple[int, ...]]
Value = TypeVar("Value")


def diffusion_names(stored: Iterable[str]) -> dict[str, str]:
    """Model name to stored name of every tensor of the diffusion model.

    stable-diffusion.cpp keeps the names of the original checkpoint (`model.diffusion_model.…`) and may write
    the VAE and the text encoders into the same file; AuraFlow's and Cosmos' originals start with `model.` and
    `net.`.
    """
    names = list(stored)
    own = [name for name in names if not COMPANIONS.match(name)]
    for prefix in DIFFUSION_PREFIXES:
        inside = [name for name in own if name.startswith(prefix) and name != prefix]
        # Beside the full prefix anything may lie; a short one counts only when nothing else would be lost by
        # it.
        if inside and (prefix == DIFFUSION_PREFIXES[0] or len(inside) == len(own)):
            return {name.removeprefix(prefix): name for name in inside}
    return {name: name for name in own}


def original_shape(file: GGUFFile, info: TensorInfo) -> tuple[int, ...]:
    """The shape a tensor had before it was flattened for ggml.

    ComfyUI-GGUF's convert.py reshapes the weights of SD1 and SDXL to rows of 256 so that they can be
    quantized, other tools store 5-D convolutions so; both leave `comfy.gguf.orig_shape.<tensor>` (INT32, some
    INT64).
    """
    found = file.metadata.get(ORIGINAL_SHAPE + info.name)
    if found is None:
        return info.shape
    expected = info.elements
    if isinstance(found, tuple):
        dims = tuple(dim for dim in found if isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0)
        if len(dims) == len(found) and math.prod(dims) == expected and is_possible(dims):
            return dims
    raise FileFormatError(
        file.path,
        f"the original shape stored for tensor {shown(info.name)} does not describe its {expected} elements",
        "the file was written by a faulty converter: download another conversion of the model",
    )


def unfold_conv3d(shapes: Shapes) -> None:
    """(out·in, t, h, w) → (out, in, t, h, w) for the patch embeddings of video models.

    stable-diffusion.cpp folds the two channel dimensions, as ggml has only four; the bias tells them apart.
    """
    for name, shape in shapes.items():
        if len(shape) == 4 and CONV3D.match(name):
            bias = shapes.get(name.removesuffix("weight") + "bias", ())
            out = bias[0] if len(bias) == 1 else 0
            if out and shape[0] > out and shape[0] % out == 0:
                shapes[name] = (out, shape[0] // out, *shape[1:])


def drop_conv_ones(shapes: Shapes) -> None:
    """(out, in, 1, 1) → (out, in) for `proj_in` and `proj_out` of SD2 and SDXL.

    stable-diffusion.cpp writes these linear layers as 1x1 convolutions. Stable Diffusion 1 really has
    convolutions there, and ComfyUI tells the models apart by this; its text embedding is the narrower one.
    """
    widths = {shape[-1] for name, shape in shapes.items() if shape and UNET_CONTEXT.match(name)}
    if not widths or SD1_CONTEXT_WIDTH in widths:
        return
    for name, shape in shapes.items():
        if len(shape) == 4 and shape[2:] == (1, 1) and UNET_PROJECTION.match(name):
            shapes[name] = shape[:2]


def restore_leading_ones(shapes: Shapes) -> None:
    """Give back leading dimensions of size 1 to parameters that models read with a fixed number of
    dimensions.

    llama-quantize and whatever else rewrites tensors by ggml's own count of dimensions drops them; see
    `diffusion_tables.LEADING_ONES`.
    """
    for name, shape in shapes.items():
        for pattern, fewest, expected in LEADING_ONES:
            if fewest <= len(shape) < expected and pattern.match(name):
                shapes[name] = (1,) * (expected - len(shape)) + shape
                break


def rename_qk_norms(tensors: Mapping[str, Value], parameter: Literal["scale", "weight"]) -> dict[str, Value]:
    """The same tensors with the query and key norms of Flux-like blocks named `….{parameter}`.

    Black Forest Labs' checkpoints say `scale`, and so did ComfyUI's models; newer ones say `weight`. Files
    carry either name, and a norm under the wrong one is left uninitialised, which shows only as NaN images.
    """
    return {
        f"{match[1]}.{parameter}" if (match := QK_NORM.match(name)) else name: tensor
        for name, tensor in tensors.items()
    }
