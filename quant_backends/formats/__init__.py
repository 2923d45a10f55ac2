"""Every tensor format, registered by being defined; importing this package imports them all."""

from __future__ import annotations

from . import fp4, iq, k_quants, legacy, plain, ternary
from .base import FORMATS, Format, Scratch, quantizable_formats

__all__ = [
    "FORMATS",
    "Format",
    "Scratch",
    "format_by_ggml_type",
    "fp4",
    "iq",
    "k_quants",
    "legacy",
    "plain",
    "quantizable_formats",
    "ternary",
]

_BY_GGML_TYPE = {fmt.ggml_type: fmt for fmt in FORMATS.values()}


def format_by_ggml_type(ggml_type: int) -> type[Format]:
    """The format with ggml's type number `ggml_type`; KeyError when Snug does not know it."""
    return _BY_GGML_TYPE[ggml_type]
