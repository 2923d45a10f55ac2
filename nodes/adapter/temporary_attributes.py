"""Attributes of modules that differ while something runs, and are as before when it is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

# (module, name of an attribute, its value for the time of a call)
Change: TypeAlias = "tuple[torch.nn.Module, str, Any]"
_ABSENT = object()


@contextmanager
def temporary_attributes(changes: Iterable[Change]) -> Iterator[None]:
    """Sets attributes of the modules themselves (not parameters), one after the other, until the end of the block."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, name, value in changes:
            attributes = module.__dict__
            replaced.append((attributes, name, attributes.get(name, _ABSENT)))
            attributes[name] = value
        yield
    finally:
        for attributes, name, previous in reversed(replaced):
            if previous is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = previous
