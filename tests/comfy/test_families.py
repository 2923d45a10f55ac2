"""Every family samples from quantized files in the real ComfyUI, and gives the latents of its dense twin."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from comfy_server import ComfyServer
from native_quantizer import AVAILABLE, MISSING
from quantized_files import KINDS
from tiny import FAMILIES
from twins import Twins
from workflows import build_workflow, saved_latent

FORMATS = ["F16", "Q8_0", "Q4_0", "Q4_K", "IQ4_XS"]
# Both runs calculate in float32 on the same weights; the packed one multiplies tile by tile.
TOLERANCE = 2e-5

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_equal_the_dense_twin(
    family: str, format: str, twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    if format in ("Q4_K", "IQ4_XS") and not AVAILABLE:
        pytest.skip(MISSING)
    compare(family, format, twins, comfy_server)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_quantized_safetensors(
    family: str, kind: str, twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    """Every convention, written by its own library."""
    compare(family, kind, twins, comfy_server)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8", "quanto-int8", "torchao-int8"])
def test_sdxl_of_every_library(
    kind: str, twins: Callable[[str, str], Twins], comfy_server: ComfyServer
) -> None:
    """One kind of each library: the smallest SDXL takes seconds to quantize."""
    compare("sdxl", kind, twins, comfy_server)


def compare(family: str, format: str, twins: Callable[[str, str], Twins], comfy_server: ComfyServer) -> None:
    pair = twins(family, format)
    outputs = comfy_server.run(build_workflow(family, "snug", pair.gguf.name, model_info=True))
    packed = saved_latent(comfy_server, outputs)
    dense = saved_latent(comfy_server, comfy_server.run(build_workflow(family, "dense", pair.dense.name)))

    assert packed.isfinite().all() and packed.std() > 0.01
    assert (packed - dense).norm() / dense.norm() < TOLERANCE
    check_memory(json.loads(outputs["info"]["model_info"][0]), pair, format)


def check_memory(info: dict[str, Any], pair: Twins, format: str) -> None:
    """The weights are comfy-kitchen tensors, and ComfyUI counts them at the size they have in the file."""
    packed = info["parameters"]["QuantizedTensor:snug.Packed"]
    # Matrices of 16 bits that the writer did not quantize stay as they are in the file as well.
    plain = packed["weights"] - pair.packed_weights
    assert plain >= 0
    assert packed["bytes"] == pair.packed_bytes + 2 * plain
    rest = sum(kind["bytes"] for name, kind in info["parameters"].items() if not name.startswith("Quantized"))
    schedule = 64 * 1024  # sigmas, outside the denoiser
    assert info["model_size"] == pytest.approx(packed["bytes"] + rest, abs=schedule)
    assert info["loaded_size"] == info["model_size"]
    assert packed["weights"] > 0.3 * (packed["weights"] + rest / 4), "a good part of the model must be packed"
