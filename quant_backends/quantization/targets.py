"""What users choose to quantize to. Names are stored in workflows and never change."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.errors import SnugError
from .gguf_targets import GGUF
from .library_targets import LIBRARIES, SIZED
from .product_targets import PRODUCTS, threshold_target
from .target import Target

_TARGETS: Mapping[str, Target] = {target.name: target for target in (*GGUF, *LIBRARIES)}
# Those that change how layers calculate.
_PRODUCTS: Mapping[str, Target] = {target.name: target for target in PRODUCTS}


def targets() -> Mapping[str, Target]:
    """Every target by its name, in the order of menus; those that are not available say why."""
    return dict(_TARGETS)


def product_targets() -> Mapping[str, Target]:
    """Those that make layers multiply in 8 bits; by name, in the order of menus. Some need a calibration."""
    return dict(_PRODUCTS)


def find_target(name: str, size: int | None = None) -> Target:
    """The target called `name`, with `size` weights to a scale where its library lets one choose.

    Names of targets with another size than the usual, which menus do not show, are found as well. Raises SnugError for
    an unknown name, a size that is not possible, and for a target that is not available.
    """
    for family in SIZED:
        found = family.size_in(name)
        if found is not None:
            return family.target(size or found)
    target = _TARGETS.get(name) or _PRODUCTS.get(name) or threshold_target(name)
    if target is None:
        every = (*_TARGETS.values(), *_PRODUCTS.values())
        known = ", ".join(target.name for target in every if not target.unavailable)
        raise SnugError(f"There is no quantization called {name!r}; choose one of {known}.")
    if target.unavailable:
        raise SnugError(target.unavailable)
    if size:
        raise SnugError(f"{name} has no block size to choose; leave it at 0.")
    return target
