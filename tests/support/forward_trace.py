"""What one call asks torch's dispatcher for: reads by the host, copies between devices, constants, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result the host has to wait for, and those whose result's shape depends on values.
_READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")
# Operations that make a tensor of numbers which are known beforehand: it could have been made once. Zeros are
# what sums begin with.
_CONSTANTS = ("lift_fresh", "lift", "scalar_tensor", "arange", "full", "ones", "eye", "linspace")


class ForwardTrace(TorchDispatchMode):
    """Lists of operations by kind while it is active: `reads`, `copies` (between devices), `constants`, `subclasses`
    (those that got a tensor subclass with a dispatch of its own), and how many there were in all: `count`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.reads: list[str] = []
        self.copies: list[str] = []
        self.constants: list[str] = []
        self.subclasses: list[str] = []
        self._made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket.__name__)
        self.count += 1
        subclass = any(kind is not torch.Tensor for kind in types)
        if subclass:
            self.subclasses.append(name)
        for names, found in ((_READS, self.reads), (_CONSTANTS, self.constants)):
            if name in names:
                found.append(name)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device for tensor in [*given, *made]}
        # A number as operand on the CPU is passed along with the operation, a number that is copied is not.
        if len(devices) > 1 and (name in ("_to_copy", "copy_") or all(tensor.dim() for tensor in given)):
            self.copies.append(name)
        known = {StorageWeakRef(tensor.untyped_storage()) for tensor in given if not subclass}
        for tensor in made if not subclass else ():
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in known:
                self._made.append(storage)
        return result

    def kept(self) -> int:
        """How many of the storages that were made exist still."""
        return len({storage.cdata for storage in self._made if not storage.expired()})


def trace(call: Callable[[], Any], warm_up: int = 1) -> tuple[ForwardTrace, Any]:
    """(what a call does after it ran `warm_up` times before, its result)"""
    for _ in range(warm_up):
        call()
    found = ForwardTrace()
    with found:
        result = call()
    return found, result
