"""Writes diffusion models as GGUF files: quantized weights in the container of the gguf package.

Metadata and tensor layout are those of the files people have (general.architecture,
general.quantization_version, general.file_type, comfy.gguf.orig_shape.<tensor> for tensors stored in another
shape), so that any loader of such files reads them.
"""

from __future__ import annotations

import importlib
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..core.errors import SnugError
from ..core.packed import PackedTensor
from ..formats import FORMATS, Format, quantizable_formats
from ..kernels.dequantize import quantize
from .architecture import detect_architecture
from .mixes import MIXES, Mix
from .new_file import check_disk_space, new_file
from .plan import PlannedTensor, plan_tensors
from .precision import RULES, TEXT_ENCODER_RULES, PrecisionRules

MetadataValue: TypeAlias = (
    "str | bool | int | float | bytes | Sequence[str] | Sequence[int] | Sequence[float]"
)
Quantizer: TypeAlias = Callable[[torch.Tensor, str], torch.Tensor]
Progress: TypeAlias = Callable[[int, int], None]

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def write_gguf(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | PackedTensor],
    format: str | None,
    *,
    architecture: str | None = None,
    metadata: Mapping[str, MetadataValue] | None = None,
    quantizer: Quantizer | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model to the GGUF file `path`, its matrices in `format` ("Q8_0", "Q4_K", "F16", ...) or in the formats of
    a mix ("Q4_K_M", ...; `mixes.MIXES`); None: whatever is not packed already stays in 16 or 32 bits.

    tensors: floating point weights by their original names, without a prefix such as
        "model.diffusion_model."; taken and converted one at a time. Those that are packed in a ggml format are
        stored byte for byte.
    architecture: value of general.architecture; None detects it from the names.
    metadata: further keys of the file.
    quantizer: called with float32 values [rows, columns] and the format's name, returns the packed rows as
        uint8, for formats that Snug itself cannot write; None uses Snug's own.
    progress: called with the bytes written and all there are, after each tensor; may raise to stop.

    The file appears under its name only when complete: it is written beside it and renamed, an older file
    stays until then and nothing is left behind on an error. Raises SnugError for an unknown format or
    architecture, for tensors that GGUF cannot hold and when the disk is too full or the gguf package missing.
    """
    gguf = _import_gguf()
    target = Path(path)
    wanted = None if format is None else _writable_format(format, quantizer)
    architecture = architecture or detect_architecture(tensors.keys())
    if architecture is None:
        raise SnugError(
            f"The architecture of {target.name} is not known from its tensor names; pass architecture=, "
            f"one of {', '.join(RULES)}, and tensor names without a prefix."
        )
    rules = RULES.get(architecture) or TEXT_ENCODER_RULES.get(architecture, PrecisionRules())
    plan = plan_tensors(tensors, wanted, rules)
    total = sum(planned.nbytes for planned in plan)
    check_disk_space(target, total)

    with new_file(target) as temporary, closing(gguf.GGUFWriter(temporary, architecture)) as writer:
        _add_metadata(gguf, writer, wanted.name if wanted else _main_format(plan), metadata or {})
        for planned in plan:
            _add_tensor_info(gguf, writer, planned)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for planned in plan:
            packed = _pack(tensors[planned.name], planned, quantizer)
            writer.write_tensor_data(packed.numpy())
            done += planned.nbytes
            if progress is not None:
                progress(done, total)


def _import_gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise SnugError(
            'Writing GGUF files needs the gguf package, which is not installed; run "pip install gguf".'
        ) from error


def _writable_format(name: str, quantizer: Quantizer | None) -> type[Format] | Mix:
    mix = MIXES.get(name)
    fmt = FORMATS.get(mix.base if mix else name)
    choices = ", ".join(quantizable_formats())
    if fmt is None or (fmt.dtype is not None and not fmt.can_quantize):
        raise SnugError(f"{name!r} is no format for weights; choose one of {choices}.")
    if quantizer is None and not fmt.can_quantize:
        raise SnugError(f"Snug cannot quantize to {name}; choose one of {choices} or pass a quantizer.")
    return mix or fmt


def _add_metadata(gguf: Any, writer: Any, format: str, metadata: Mapping[str, MetadataValue]) -> None:
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    file_type = _file_type(gguf, format)
    if file_type is not None:
        writer.add_file_type(file_type)
    for key, value in metadata.items():
        _add_value(gguf, writer, key, value)


def _main_format(plan: Sequence[PlannedTensor]) -> str:
    """The format that most weights are in."""
    weights: Counter[str] = Counter()
    for planned in plan:
        weights[planned.format.name] += math.prod(planned.shape)
    return weights.most_common(1)[0][0] if weights else "F32"


def _file_type(gguf: Any, name: str) -> int | None:
    """llama.cpp's number for a file mostly of this format; _S names the mix without larger types."""
    known = gguf.LlamaFileType.__members__
    for candidate in (f"MOSTLY_{name}", f"MOSTLY_{name}_S", f"MOSTLY_{name}_MOE", f"ALL_{name}"):
        if candidate in known:
            return int(known[candidate])
    return None


def _add_value(gguf: Any, writer: Any, key: str, value: MetadataValue) -> None:
    types = gguf.GGUFValueType
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        fits = 0 <= value < 1 << 32
        writer.add_key_value(key, value, types.UINT32 if fits else types.INT64)
    elif isinstance(value, float):
        writer.add_key_value(key, value, types.FLOAT32)  # what llama.cpp expects of every number
    else:
        writer.add_array(key, value if isinstance(value, bytes) else list(value))


def _add_tensor_info(gguf: Any, writer: Any, planned: PlannedTensor) -> None:
    if planned.original_shape:
        writer.add_array(ORIGINAL_SHAPE + planned.name, list(planned.original_shape))
    ggml_type = gguf.GGMLQuantizationType(planned.format.ggml_type)
    # The element type, None here, only serves to guess the ggml type.
    writer.add_tensor_info(planned.name, planned.shape, None, planned.nbytes, ggml_type)


def _pack(
    tensor: torch.Tensor | PackedTensor, planned: PlannedTensor, quantizer: Quantizer | None
) -> torch.Tensor:
    """The tensor's bytes in the file: uint8, one dimension."""
    if isinstance(tensor, PackedTensor):
        return tensor.data.cpu()
    values = tensor.detach().cpu().reshape(planned.shape)
    plain = planned.format.dtype
    if plain is not None:
        packed = values.to(plain)
        if plain == torch.float16 and not packed.isfinite().all() and values.float().isfinite().all():
            raise SnugError(
                f"Tensor {planned.name!r} has weights up to {values.abs().max().item():.3g}, outside the range of "
                f"F16; choose the format BF16 or pass the model in bfloat16."
            )
        return packed.contiguous().view(torch.uint8).view(-1)
    if quantizer is None:
        packed = quantize(values, planned.format)
    else:
        packed = quantizer(values.float().contiguous(), planned.format.name)
    packed = packed.contiguous().view(-1)
    planned.format.check_nbytes(packed.numel(), planned.shape)
    return packed
