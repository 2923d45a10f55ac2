"""The models that ComfyUI has loaded, and which node used each of them last."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management as management
import torch

from ..adapter.compat import is_dynamic
from ..adapter.weight_formats import main_formats
from .accounting import ModelRow
from .events import Holding

Key = tuple[int, str]


class LoadedModels:
    """Rows of the models, without clones of one another. Used by one thread to look and by another to mark."""

    def __init__(self) -> None:
        # ComfyUI makes a new finalizer whenever it loads a model for use, even one that is there already.
        self._uses: dict[Key, tuple[object, str | None]] = {}
        self._pinned: WeakKeyDictionary[torch.nn.Module, tuple[int, int]] = WeakKeyDictionary()
        self._formats: WeakKeyDictionary[torch.nn.Module, tuple[str, ...]] = WeakKeyDictionary()
        # An id is given to another model once the first is gone; these numbers are not.
        self._numbers: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
        self._counter = count()

    def mark(self, node: str | None) -> None:
        """Whatever was loaded for use since this was called last was so for `node`."""
        uses: dict[Key, tuple[object, str | None]] = {}
        for key, loaded, _ in _distinct():
            use = self._uses.get(key)
            is_same = use is not None and use[0] is loaded.model_finalizer
            uses[key] = use if use is not None and is_same else (loaded.model_finalizer, node)
        self._uses = uses

    def holdings(self) -> dict[tuple[int, str], Holding]:
        """What devices hold of each model, by the model's number and the device."""
        found = {}
        for _, loaded, patcher in _distinct():
            number = self._numbers.get(patcher.model)
            if number is None:
                number = self._numbers[patcher.model] = next(self._counter)
            total = int(patcher.model_size())
            nbytes = total if is_dynamic(patcher) else min(int(patcher.loaded_size()), total)
            device = str(loaded.device)
            found[number, device] = Holding(type(patcher.model).__name__, device, nbytes)
        return found

    def rows(self) -> list[ModelRow]:
        rows = []
        for key, loaded, patcher in _distinct():
            total, on_device = int(patcher.model_size()), int(patcher.loaded_size())
            formats = self._formats.get(patcher.model)
            if formats is None:
                formats = self._formats[patcher.model] = tuple(main_formats(patcher.model))
            rows.append(
                ModelRow(
                    name=type(patcher.model).__name__,
                    device=str(loaded.device),
                    formats=formats,
                    on_device=min(on_device, total),
                    offloaded=max(0, total - on_device),
                    pinned=self._pinned_bytes(patcher),
                    total=total,
                    is_paged=is_dynamic(patcher),
                    last_node=self._uses.get(key, (None, None))[1],
                )
            )
        return rows

    def _pinned_bytes(self, patcher: Any) -> int:
        """Of weights in pinned memory; added up again when ComfyUI pinned or released some."""
        if is_dynamic(patcher):
            return int(patcher.pinned_memory_size()) if hasattr(patcher, "pinned_memory_size") else 0
        names = set(patcher.pinned)
        count, nbytes = self._pinned.get(patcher.model, (0, 0))
        if count != len(names):
            nbytes = sum(value.nbytes for name, value in patcher.model_state_dict().items() if name in names)
            self._pinned[patcher.model] = len(names), nbytes
        return nbytes


def _distinct() -> list[tuple[Key, Any, Any]]:
    """(key, ComfyUI's entry, patcher) of each loaded model; a patcher may be gone while its entry is there still."""
    found: dict[Key, tuple[Any, Any]] = {}
    for loaded in list(management.current_loaded_models):
        patcher = loaded.model
        if patcher is not None:
            found.setdefault((id(patcher.model), str(loaded.device)), (loaded, patcher))
    return [(key, *entry) for key, entry in found.items()]
