"""On a CUDA device: packed models in every memory mode of the real server give what dense ones give."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer
from quantized_files import KINDS, quantized_twins
from snug_path import ROOT
from tiny import make_tiny_lora, make_tiny_model, use_comfyui
from twins import make_twins
from workflows import Lora, build_workflow, saved_latent, with_casting, with_offload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.comfy,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# ComfyUI's own choice (dynamic VRAM where it has it), then the static modes that it can be told to use.
MODES = ["default", "highvram", "lowvram", "novram"]
TEST_NODES = ROOT / "tests" / "comfy" / "custom_nodes" / "snug_test_nodes"


@pytest.fixture(scope="module", params=MODES)
def server(
    request: pytest.FixtureRequest, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    arguments = [] if request.param == "default" else [f"--{request.param}"]
    packs = {"ComfyUI-Snug": ROOT, "snug_test_nodes": TEST_NODES}
    base = tmp_path_factory.mktemp(request.param)
    with ComfyServer(
        Path(sys.executable), comfyui_path, base, packs, cpu=False, arguments=arguments
    ) as server:
        yield server


@pytest.fixture(scope="module", params=["Q8_0", "nf4", "int8", "fp8", "quanto-int8"])
def sample(
    request: pytest.FixtureRequest, server: ComfyServer, comfyui_path: Path
) -> Callable[..., torch.Tensor]:
    """sample("snug" or "dense", LoRAs) of a tiny Flux in one format, cast to float8 behind the node `cast_after`,
    streamed behind `offload_after`.
    """
    use_comfyui(comfyui_path)
    models = server.base / "models"
    (models / "loras").mkdir(parents=True, exist_ok=True)
    source = models / "flux.safetensors"
    make_tiny_model("flux", source)
    make_tiny_lora(source, models / "loras" / "lora.safetensors")
    (models / "diffusion_models").mkdir(exist_ok=True)
    write = quantized_twins if request.param in KINDS else make_twins
    pair = write(source, models / "diffusion_models", request.param)
    files = {"snug": pair.gguf.name, "dense": pair.dense.name}

    def run(
        loader: str, *loras: Lora, cast_after: str = "", offload_after: str = "", **settings: Any
    ) -> torch.Tensor:
        workflow = build_workflow("flux", loader, files[loader], loras=loras, compute_dtype="bf16")  # type: ignore[arg-type]
        if cast_after:
            with_casting(workflow, cast_after)
        if offload_after:
            with_offload(workflow, offload_after, **settings)
        return saved_latent(server, server.run(workflow))

    return run


def test_latents_equal_within_bfloat16(sample: Callable[..., torch.Tensor]) -> None:
    packed, dense = sample("snug"), sample("dense")
    assert (packed - dense).norm() < 0.02 * dense.norm()


def test_lora_arrives_and_leaves(sample: Callable[..., torch.Tensor]) -> None:
    lora = ("lora.safetensors", 1.0)
    plain, with_lora, again = sample("snug"), sample("snug", lora), sample("snug")
    wanted = sample("dense", lora) - sample("dense")
    assert ((with_lora - plain) - wanted).norm() < 0.05 * wanted.norm()
    assert torch.equal(again, plain)


def test_layerwise_casting_on_either_side_of_a_lora(sample: Callable[..., torch.Tensor]) -> None:
    """The second time the model that is cast has just been used, and lies on the GPU with the LoRA merged."""
    lora = ("lora.safetensors", 1.0)
    plain, with_lora = sample("dense"), sample("dense", lora)
    cast = sample("dense", cast_after="model")
    assert 1e-4 < (cast - plain).norm() / plain.norm() < 0.1
    before = sample("dense", lora, cast_after="lora_0")
    after = sample("dense", lora, cast_after="model")
    assert (before - after).norm() < 0.02 * after.norm()
    assert ((before - cast) - (with_lora - plain)).norm() < 0.3 * (with_lora - plain).norm()
    assert torch.equal(sample("dense"), plain)


@pytest.mark.parametrize("loader", ["snug", "dense"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"level": "single layers"},
        {"prefetch": "0", "pin_memory": False},
        {"blocks_per_group": 2},
        {"offload_to": "disk"},
    ],
    ids=["blocks", "layers", "pageable", "groups", "disk"],
)
def test_streamed_blocks(sample: Callable[..., torch.Tensor], loader: str, settings: dict[str, Any]) -> None:
    lora = ("lora.safetensors", 1.0)
    plain, with_lora = sample(loader), sample(loader, lora)
    for _ in range(2):
        assert torch.equal(sample(loader, offload_after="model", **settings), plain)
    streamed = sample(loader, lora, offload_after="lora_0", **settings)
    assert ((streamed - plain) - (with_lora - plain)).norm() < 0.05 * (with_lora - plain).norm()
    assert torch.equal(sample(loader), plain)


@pytest.mark.parametrize("format", ["Q8_0", "nf4", "int8", "fp8"])
def test_a_limit_smaller_than_the_model(server: ComfyServer, comfyui_path: Path, format: str) -> None:
    """Of 60 MB and more of packed weights, half may stay: with dynamic VRAM ComfyUI pages the rest, else it is
    streamed. LoRA is right all the same, and what stays is counted packed.
    """
    use_comfyui(comfyui_path)
    models = server.base / "models"
    (models / "loras").mkdir(parents=True, exist_ok=True)
    (models / "diffusion_models").mkdir(exist_ok=True)
    source = models / "sdxl.safetensors"
    if not source.exists():
        make_tiny_model("sdxl", source)
        make_tiny_lora(source, models / "loras" / "sdxl.safetensors")
    write = quantized_twins if format in KINDS else make_twins
    file = write(source, models / "diffusion_models", format).gguf
    limit = file.stat().st_size / 2**31

    def run(*loras: Lora, limited: bool = False) -> tuple[torch.Tensor, dict[str, Any]]:
        workflow = build_workflow("sdxl", "snug", file.name, loras=loras, model_info=True)
        if limited:
            with_offload(workflow, "lora_0" if loras else "model", limit_gb=limit)
        outputs = server.run(workflow)
        return saved_latent(server, outputs), json.loads(outputs["info"]["model_info"][0])

    lora = ("sdxl.safetensors", 1.0)
    plain, with_lora = run()[0], run(lora)[0]
    limited, info = run(limited=True)
    assert (limited - plain).norm() < 0.01 * plain.norm()
    assert info["loaded_size"] < 0.75 * info["model_size"]
    assert (run(lora, limited=True)[0] - with_lora).norm() < 0.05 * (with_lora - plain).norm()
