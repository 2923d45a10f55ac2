"""Scaled formats by name: what travels with a weight is a string, and this turns it back into the format."""

from __future__ import annotations

from functools import lru_cache

from ..core.errors import SnugError
from .base import FORMATS, Format
from .bitsandbytes_4bit import BitsAndBytes4Bit
from .eight_bit_products import EightBitProducts
from .outlier_products import OutlierProducts
from .quanto_groups import QuantoGroups
from .rotated_rows import RotatedRows
from .scaled_base import ScaledFormat
from .scaled_elements import ScaledElements

__all__ = [
    "BitsAndBytes4Bit",
    "EightBitProducts",
    "OutlierProducts",
    "QuantoGroups",
    "RotatedRows",
    "ScaledElements",
    "ScaledFormat",
    "format_called",
    "scaled_format",
]


@lru_cache(maxsize=256)
def scaled_format(name: str) -> ScaledFormat:
    """The format called `name`; SnugError when there is none."""
    kinds = (BitsAndBytes4Bit, ScaledElements, QuantoGroups, RotatedRows, EightBitProducts, OutlierProducts)
    for kind in kinds:
        found = kind.parse(name)
        if found is not None:
            return found
    raise SnugError(f"There is no scaled format called {name!r}; the file may need a newer version of Snug.")


def format_called(name: str) -> type[Format] | ScaledFormat:
    """The format called `name`, of either kind; SnugError when there is none."""
    return FORMATS.get(name) or scaled_format(name)
