"""From a ControlNet file to ComfyUI's CONTROL_NET."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import comfy.controlnet
import comfy.model_detection
import comfy.utils
import torch

from ...quant_backends.core.errors import FileFormatError, SnugError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.readers import GGUFFile
from ...quant_backends.readers.controlnet_kind import refuse_other_kinds, with_dense
from ...quant_backends.readers.conventions import load_quantized, recognise
from ...quant_backends.readers.diffusion_gguf import load_repaired
from ...quant_backends.readers.gguf_file import looks_like_gguf
from ...quant_backends.readers.gguf_values import REDOWNLOAD, shown
from ...quant_backends.readers.join_rows import Value, join_rows, rows
from ...quant_backends.readers.safetensors_file import SafetensorsFile
from ...quant_backends.readers.sharded_safetensors import refuse_part
from .core_errors import refused_as, summary
from .layout import pack
from .loading import UNDECIDED_DTYPE, ignore
from .operations import build_operations
from .packed_module import LoadSettings, set_compute_dtype
from .patcher import adopt

logger = logging.getLogger("snug")

# Networks whose outputs are averaged over the image are known by their names alone, to ComfyUI as well.
AVERAGED = ("_shuffle", "_shuffle_fp16")


def load_controlnet(path: str, model: Any = None) -> Any:
    """Load a ControlNet: quantized weights stay packed; plain files are left to ComfyUI's own loader.

    model: a ModelPatcher that a difference ControlNet is the difference to, or None.
    Raises FileFormatError when the file is damaged, or no ControlNet that this ComfyUI knows.
    """
    # Two passes over the bytes: reading (most is only mapped, some is decoded) and building the network.
    bar = comfy.utils.ProgressBar(2 * os.path.getsize(path) if os.path.exists(path) else 0)
    tensors = _open(path, lambda done, _total: bar.update_absolute(done))
    settings = LoadSettings(on_weight=bar.update)
    with refused_as(lambda error: _unsupported(path, f"ComfyUI cannot build it ({summary(error)})")):
        if tensors is None:
            control = comfy.controlnet.load_controlnet(path, model)
        else:
            control = _build(path, tensors, model, settings)
    if control is None:
        raise _unsupported(path, "its tensors match none of the ControlNets that this ComfyUI knows")
    settings.on_weight = ignore
    bar.update_absolute(bar.total)
    return control


def _open(path: str, progress: Callable[[int, int], None]) -> dict[str, Value] | None:
    """The tensors of a quantized ControlNet; None for plain files."""
    if looks_like_gguf(path):
        gguf = GGUFFile(path)
        refuse_other_kinds(gguf.path, gguf.tensors, gguf.metadata)
        return with_dense(load_repaired(gguf, gguf.tensors, progress))
    refuse_part(path)
    file = SafetensorsFile(path)
    convention = recognise(file)
    refuse_other_kinds(file.path, file.tensors, file.metadata)
    if convention.name == "plain":
        return None
    if not convention.loaders:
        file.fail(
            f"the file is quantized as {' and '.join(sorted(convention.core_formats))}, ComfyUI's own format, which "
            f"it does not load in ControlNets",
            "choose a GGUF, NF4 or FP8 version of it",
        )
    return with_dense(load_quantized(file).state_dict)


def _build(path: str, tensors: dict[str, Value], model: Any, settings: LoadSettings) -> Any:
    packed = any(isinstance(value, PackedTensor) for value in tensors.values())
    options: dict[str, Any] = {"custom_operations": build_operations(settings)} if packed else {}
    if os.path.splitext(path)[0].endswith(AVERAGED):
        options["global_average_pooling"] = True
    joined, parts = _joined(path, tensors)
    state_dict = {
        # ComfyUI joins these by calculating on the weights: it gets their shapes, and the layer its weight below.
        name: torch.empty(tuple(value.shape), device="meta", dtype=UNDECIDED_DTYPE)
        if name in parts
        else _as_weight(value)
        for name, value in tensors.items()
    }
    control = comfy.controlnet.load_controlnet_state_dict(state_dict, model=model, model_options=options)
    network = getattr(control, "control_model", None)
    if packed and network is not None:
        network.load_state_dict({name: _as_weight(value) for name, value in joined.items()}, strict=False)
        adopt(control.control_model_wrapped)
        set_compute_dtype(network, control.manual_cast_dtype or network.dtype)
    return control


def _as_weight(value: Value) -> torch.Tensor:
    return pack(value, UNDECIDED_DTYPE) if isinstance(value, PackedTensor) else value


def _joined(path: str, tensors: Mapping[str, Value]) -> tuple[dict[str, Value], set[str]]:
    """What ComfyUI joins of diffusers' layers (query, key and value), and the names of the parts.

    Where each row goes is asked of ComfyUI's own conversion: it is given numbered rows instead of weights.
    """
    first, starts = 0, {}
    for name, value in tensors.items():
        starts[name] = first
        first += (
            value.shape[0] if len(value.shape) else 1
        ) + 1  # a gap, so that runs of rows end with their tensor
    numbered = {}
    for name, value in tensors.items():
        count = value.shape[0] if len(value.shape) else 1
        ids = torch.arange(starts[name], starts[name] + count)
        numbered[name] = ids if len(value.shape) < 2 else ids[:, None]
    converted = comfy.model_detection.convert_diffusers_mmdit(numbered, "") or {}
    names = list(starts)
    bounds = torch.tensor(list(starts.values()))
    joined, parts = {}, set()
    for target, ids in converted.items():
        runs = _runs(ids.flatten())
        if len(runs) < 2:
            continue
        places = [
            (names[int(torch.searchsorted(bounds, start, right=True)) - 1], start, stop)
            for start, stop in runs
        ]
        if not any(isinstance(tensors[name], PackedTensor) for name, _, _ in places):
            continue
        used: Counter[str] = Counter()
        for name, start, stop in places:
            used[name] += stop - start
        problem = f"the parts of {shown(target)} are incomplete or do not fit together"
        if any(count != tensors[name].shape[0] for name, count in used.items()):
            raise FileFormatError(path, problem, REDOWNLOAD)
        try:
            pieces = [
                rows(tensors[name], start - starts[name], stop - starts[name]) for name, start, stop in places
            ]
            joined[target] = join_rows(pieces)
        except SnugError as error:
            raise FileFormatError(path, problem, REDOWNLOAD) from error
        parts.update(used)
    return joined, parts


def _runs(ids: torch.Tensor) -> list[tuple[int, int]]:
    """(first, last + 1) of every run of consecutive numbers."""
    if not len(ids):
        return []
    cuts = [0, *((ids.diff() != 1).nonzero().flatten() + 1).tolist(), len(ids)]
    return [(int(ids[start]), int(ids[stop - 1]) + 1) for start, stop in zip(cuts, cuts[1:], strict=False)]


def _unsupported(path: str, problem: str) -> FileFormatError:
    return FileFormatError(
        path,
        f"the file cannot be used as a ControlNet: {problem}",
        "update ComfyUI if the ControlNet is newer than it, or choose another file",
    )
