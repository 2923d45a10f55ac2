"""What files will take on the device once they are loaded, from their headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management as management

from ...quant_backends.core.errors import SnugError
from ...quant_backends.inspection.fit import Demand, estimate_fit
from .computing import computing_bytes
from .model_inspector import device_of, file_weight_bytes, find_listed


@dataclass(frozen=True, slots=True)
class FileForecast:
    """weights_bytes: in memory, None with the error that says why that is not known."""

    folder: str
    name: str
    weights_bytes: int | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """device: as torch calls it. free_bytes: there, with what ComfyUI can unload. offloaded_bytes: of the weights of
    all files together, those that do not fit there beside what computing takes at least."""

    files: tuple[FileForecast, ...]
    total_bytes: int
    device: str
    free_bytes: int
    offloaded_bytes: int


def forecast(files: Sequence[tuple[str, str]]) -> Forecast:
    """files: folder and name, as in ComfyUI's lists; of a checkpoint everything in it counts."""
    found = tuple(_of_file(folder, name) for folder, name in files)
    total = sum(file.weights_bytes or 0 for file in found)
    device = device_of(management.get_torch_device())
    fit = estimate_fit(device, Demand((), total, computing_bytes(0), ""))
    return Forecast(found, total, str(management.get_torch_device()), device.free, fit.offloaded)


def _of_file(folder: str, name: str) -> FileForecast:
    try:
        return FileForecast(folder, name, file_weight_bytes(find_listed(folder, name)))
    except SnugError as error:
        return FileForecast(folder, name, None, str(error))
