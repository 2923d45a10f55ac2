"""Layers that multiply in 8 bits, in files that Snug wrote: what the weights alone do not tell.

The metadata `snug_activations` is a JSON object, layer to how its input is rounded (`formats.eight_bit_products`,
`formats.outlier_products`); inputs of others are not. Whoever does not know it reads the same weights, in the
convention of the rest::

    "dynamic"          int8 by row, or float8 with one scale
    "static"           float8 with one scale and `L.input_scale`, float32 [1]
    "outliers 6"       bitsandbytes' int8; the number is the threshold

Of int8 layers whose input channels are scaled or shifted, nobody else would make sense: ComfyUI's own description of
the layer gives the format "snug_int8", which others refuse. "smooth" and "static" ones are::

    L.weight             int8 [out, in]
    L.snug_scale, L.snug_factor, L.snug_step, L.snug_shift, L.snug_offset     float32, those that the format has
"""

from __future__ import annotations

from typing import NoReturn

import torch

from ..core.errors import FileFormatError, SnugError
from ..core.packed import PackedTensor
from ..formats.eight_bit_products import EightBitProducts
from ..formats.outlier_products import WEIGHT, OutlierProducts
from ..formats.scaled import ScaledElements, ScaledFormat
from .gguf_values import REDOWNLOAD, shown
from .key_groups import KeyGroups
from .safetensors_file import SafetensorsFile, strict_json

METADATA = "snug_activations"
FORMAT = "snug_int8"  # in ComfyUI's descriptions of layers
OWN_PART = ".snug_"
OUTLIERS = "outliers "
# A line for each layer; the largest models have some thousands.
MAX_METADATA_BYTES = 1 << 24


def has_activations(file: SafetensorsFile) -> bool:
    return METADATA in file.metadata


def activations(file: SafetensorsFile) -> dict[str, str]:
    """Layer to how its input is rounded; FileFormatError unless the metadata is an object of texts."""
    content = file.metadata.get(METADATA, "{}").encode("utf-8", "replace")
    if len(content) > MAX_METADATA_BYTES:
        file.fail(f"{METADATA} has {len(content)} bytes, expected at most {MAX_METADATA_BYTES}")
    try:
        found = strict_json(content)
    except ValueError as error:
        file.fail(f"{METADATA} is not valid JSON ({error})")
    if not isinstance(found, dict) or not all(isinstance(kind, str) for kind in found.values()):
        file.fail(f"{METADATA} does not say for each layer how its input is rounded")
    return found


def format_with(stored: str, kind: str) -> ScaledFormat | None:
    """The format of a weight of codes `stored` whose input is rounded as `kind` says; None: there is none."""
    if kind.startswith(OUTLIERS):
        return OutlierProducts.parse(f"product-int8-scb-{kind.removeprefix(OUTLIERS)}")
    return EightBitProducts.parse(f"product-{stored}-{kind}")


def load_activations(groups: KeyGroups) -> None:
    """Gives the weights that are put together, or are of Snug's own format, what the metadata says of their input."""
    for layer, kind in activations(groups.file).items():
        name = f"{layer}.weight"
        try:
            if f"{layer}{OWN_PART}scale" in groups.left:
                _load_own(groups, layer, kind)
            else:
                groups.state_dict[name] = _with_activations(groups, layer, kind)
        except FileFormatError:
            raise
        except SnugError as error:
            problem = f"the weight {shown(name)} is inconsistent: {str(error).removesuffix('.')}"
            raise FileFormatError(groups.file.path, problem, REDOWNLOAD) from error


def _load_own(groups: KeyGroups, layer: str, kind: str) -> None:
    fmt = format_with("int8", kind)
    if not isinstance(fmt, EightBitProducts):
        _refuse(groups, layer, kind)
    name = f"{layer}.weight"
    data = groups.take(name)
    parts = {part: groups.take(f"{layer}{OWN_PART}{part}") for part in fmt.part_names}
    groups.pack(name, data, fmt.name, tuple(data.shape), parts)


def _with_activations(groups: KeyGroups, layer: str, kind: str) -> PackedTensor:
    packed = groups.state_dict.get(f"{layer}.weight")
    if not isinstance(packed, PackedTensor) or not isinstance(packed.format, ScaledElements):
        _refuse(groups, layer, kind)
    elements = packed.format
    fmt = format_with(elements.stored, kind)
    parts = dict(packed.parts)
    if isinstance(fmt, OutlierProducts) and elements == WEIGHT:
        return PackedTensor(packed.data, fmt, packed.shape, parts)
    by_tensor, by_row = elements.block == (0, 0), elements.block == (1, 0)
    fits = by_tensor if elements.stored != "int8" else by_row or packed.shape[0] == 1
    if not isinstance(fmt, EightBitProducts) or not fits or elements.zero or elements.scb:
        _refuse(groups, layer, kind)
    parts["scale"] = parts["scale"].view(-1)
    if "step" in fmt.part_names:
        parts["step"] = groups.extras.get(f"{layer}.input_scale", torch.empty(0)).view(-1)
    return PackedTensor(packed.data, fmt, packed.shape, parts)


def _refuse(groups: KeyGroups, layer: str, kind: str) -> NoReturn:
    groups.file.fail(
        f"the input of {shown(layer)} is to be rounded as {shown(kind)}, which its weight is not made for",
        "update Snug if the file is newer than it, or download it again",
    )
