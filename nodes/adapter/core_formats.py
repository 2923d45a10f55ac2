"""Which safetensors files ComfyUI's own loaders take."""

from __future__ import annotations

from ...quant_backends.readers.conventions import recognise
from ...quant_backends.readers.core_quant import is_per_layer
from ...quant_backends.readers.safetensors_file import SafetensorsFile
from .compat import core_quantization


def is_plain(file: SafetensorsFile) -> bool:
    """Whether nothing in a file is quantized, except as float8 without scales."""
    return recognise(file).name == "plain"


def is_for_core(file: SafetensorsFile) -> bool:
    """Whether a file is left to ComfyUI: not quantized, or in formats of its own that this version knows.

    Raises FileFormatError when it is quantized in a way that neither Snug nor this ComfyUI loads.
    """
    if is_plain(file):
        return True
    convention = recognise(file)
    unknown = convention.core_formats - core_quantization(is_per_layer(file))
    if convention.core and not unknown:
        return True
    if convention.core and not convention.loaders:
        names = " and ".join(sorted(unknown))
        file.fail(
            f"the file is quantized as {names}, ComfyUI's own format, which this ComfyUI does not know yet",
            "update ComfyUI, or load a GGUF, NF4 or FP8 version of the model",
        )
    return False
