"""ggml's own quantizers from the libgguf package, for the types that Snug cannot write."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch

AVAILABLE = importlib.util.find_spec("libgguf") is not None
MISSING = "libgguf is not installed (it has no wheel for this platform): K- and IQ-quants cannot be written"


def native_quantizer(values: torch.Tensor, name: str) -> torch.Tensor:
    """values float32 [rows, columns] in ggml type `name` ("Q4_K") as uint8 [rows, bytes per row].

    Types that ggml refuses to write without importances (IQ2_XXS and smaller) get equal ones.
    """
    import libgguf
    import numpy

    ggml_type = _types()[name]
    importance = None
    if libgguf.quantize_requires_imatrix(ggml_type):
        importance = numpy.ones(values.shape[-1], dtype=numpy.float32)
    return torch.from_numpy(libgguf.quantize_rows(values.numpy(), ggml_type, importance))


@lru_cache
def _types() -> dict[str, int]:
    import gguf

    return {entry.name: int(entry) for entry in gguf.GGMLQuantizationType}
