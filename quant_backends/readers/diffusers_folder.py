"""Diffusion models in folders, as diffusers' `save_pretrained` writes them, quantized or not."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import FileFormatError, SnugError
from .conventions import ALTERNATIVE, LoadedSafetensors, load_quantized
from .diffusers_layout import component_folder, read_config, weights_file
from .diffusers_names import to_original_names
from .gguf_values import REDOWNLOAD, shown
from .quanto_keys import PACKED
from .safetensors_file import SafetensorsFile
from .sharded_safetensors import ShardedSafetensors

LOADED_METHODS = ("bitsandbytes", "torchao", "quanto")
# Why the rest is not loaded; what is not here is just unknown.
REFUSED_METHODS = {
    "svdquant": "its weights are packed for Nunchaku's own kernels",
    "nunchaku": "its weights are packed for Nunchaku's own kernels",
    "nunchaku_lite": "its weights are packed for Nunchaku's own kernels",
    "gptq": "its layouts differ by the tool that wrote them",
    "awq": "its layouts differ by the tool that wrote them",
    "auto-round": "its layouts differ by the kernel that it was written for",
    "gguf": "a folder cannot hold it: GGUF models are single files",
}
_PROJECTION = re.compile(r"(.*\.attn\d?)\.to_([qkv])\.weight")


def open_diffusers_folder(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> LoadedSafetensors:
    """Open the denoiser of a component or pipeline folder, under the names of its reference code.

    Weights stay packed and nearly all are views of the files; what the reference fuses is joined (to_original_names).
    progress: called after every tensor with (bytes done, bytes in all).

    Raises FileFormatError when the folder is incomplete or damaged, holds something else than a diffusion model, only
    pickles, or a quantization that Snug does not load.
    """
    folder = component_folder(Path(path))
    config = read_config(folder)
    method = _quantization_method(folder, config)
    weights = weights_file(folder)
    file = ShardedSafetensors(weights) if weights.suffix == ".json" else SafetensorsFile(weights)
    loaded = load_quantized(file, _unbiased_shapes(file, config))
    if loaded.convention.core and not loaded.convention.loaders:
        formats = ", ".join(sorted(loaded.convention.core_formats)) or "none"
        file.fail(
            f"it holds weights in ComfyUI's own formats ({formats}) under diffusers' layout",
            "choose the single file that ComfyUI's loader takes",
        )
    if method and loaded.convention.name == "plain":
        file.fail(
            f"the config.json beside it says that it is quantized with {method}, but it has no such weights",
            "download the folder again, or save the model again with a current diffusers",
        )
    try:
        state_dict = to_original_names(loaded.state_dict, progress)
    except FileFormatError:
        raise
    except SnugError as error:
        raise FileFormatError(file.path, str(error).removesuffix("."), REDOWNLOAD) from error
    return dataclasses.replace(loaded, state_dict=state_dict)


def _quantization_method(folder: Path, config: Mapping[str, Any]) -> str | None:
    """What config.json says the weights are quantized with; FileFormatError for what Snug does not load."""
    found = config.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method", found.get("method")) if isinstance(found, dict) else None
    if not isinstance(method, str):
        raise FileFormatError(
            folder, "its config.json has no quant_method in quantization_config", REDOWNLOAD
        )
    if method in LOADED_METHODS:
        return method
    reason = REFUSED_METHODS.get(method.lower(), "Snug does not know it")
    raise FileFormatError(
        folder,
        f"the model is quantized with {shown(method)}, which Snug does not load: {reason}",
        ALTERNATIVE,
    )


def _unbiased_shapes(file: SafetensorsFile, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of quanto's grouped weights that have no bias to count their rows by: the projections of U-Nets.

    An attention block is as wide as its output's bias is long; its queries come from as many columns, keys and values
    too unless the block looks at the text, whose width is the config's `cross_attention_dim`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for stored, data in file.tensors.items():
        name = stored.removesuffix(PACKED)
        scale = file.tensors.get(f"{name}._scale")
        if name == stored or scale is None or name.removesuffix("weight") + "bias" in file.tensors:
            continue
        match = _PROJECTION.fullmatch(name)
        bias = file.tensors.get(f"{match[1]}.to_out.0.bias") if match else None
        rows = math.prod(bias.shape) if bias else 0
        weights = math.prod(scale.shape) * data.shape[-1] if data.shape else 0
        columns = weights // rows if rows else 0
        text = match is not None and match[1].endswith("attn2") and match[2] != "q"
        widths = _text_widths(config) if text else {rows}
        if not weights or rows * columns != weights or columns not in (widths or {rows}):
            file.fail(
                f"the shape of {shown(name)} cannot be told: quanto stores groups, there is no bias to count rows by, "
                f"and config.json does not give the widths",
                "load a version of the model quantized to qint8, NF4 or GGUF",
            )
        shapes[name] = (rows, columns)
    return shapes


def _text_widths(config: Mapping[str, Any]) -> set[int]:
    """The widths that `cross_attention_dim` names: one, or one for each level."""
    found = config.get("cross_attention_dim")
    return {width for width in (found if isinstance(found, list) else [found]) if isinstance(width, int)}
